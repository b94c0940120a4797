"""A small byte-level tokenizer with a chat template, and a folder as Llama 3 has it."""

import pytest
import tokenizers
import torch
import transformers

from gtalign_jax.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["the payoff of a clear question </payoff>\n"] * 3, 300)


LLAMA3_TEMPLATE = """{{- bos_token }}{%- set date = strftime_now("%d %b %Y") %}\
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date + "\\n\\n<|eot_id|>" }}\
{%- for message in messages %}\
{{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" }}\
{{- message.content | trim + "<|eot_id|>" }}\
{%- endfor %}\
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{%- endif %}"""
LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|pad|>"),
)


@pytest.fixture(scope="session")
def llama3_folder(tmp_path_factory):
    """A tiny random Llama as Llama 3 Instruct is: BOS by the post-processor, a template that writes a date,
    three end tokens of which the first ends no turn, sampling settings, a vocabulary with room to spare."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(LLAMA3_SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the payoff of a clear question </payoff>\n"] * 3, trainer)
    made.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=True),
            tokenizers.processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
            ),
        ]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
        chat_template=LLAMA3_TEMPLATE,
    )
    config = transformers.LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=[1, 2, 3],
        pad_token_id=6,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=0, eos_token_id=[1, 2, 3], do_sample=True, temperature=0.6, top_p=0.9
    )
    folder = tmp_path_factory.mktemp("llama3")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
