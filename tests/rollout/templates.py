"""Chat templates that do what those of real models do, in few words: name → template."""

import copy
import dataclasses

from gtalign_jax.rollout import chat


def with_template(engine, text):
    """The engine with this chat template."""
    tokenizer = copy.deepcopy(engine.tokenizer)
    tokenizer.chat_template = text
    return dataclasses.replace(engine, tokenizer=tokenizer, template=chat.ask_template(tokenizer))


CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
)


def chatml_with(default):
    """Adds a system message where there is none."""
    added = "{{ '<|im_start|>system\\n" + default + "<|im_end|>\\n' }}"
    return "{% if messages[0]['role'] != 'system' %}" + added + "{% endif %}" + CHATML


TEMPLATES = {
    "smollm2": chatml_with("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "qwen2.5": chatml_with("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    # Takes <think> out of earlier answers, and puts an empty one before the last.
    "qwen3": (
        "{% set ns = namespace(last=-1) %}"
        "{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% set content = m.content %}"
        "{% if m.role == 'assistant' %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{% if loop.index0 > ns.last %}{% set content = '<think>\\n\\n</think>\\n\\n' + content %}{% endif %}"
        "{% endif %}{{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # Always has a system turn, with dates in it.
    "llama3": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% set told = messages[0]['content'] | trim %}{% set turns = messages[1:] %}"
        "{% else %}{% set told = '' %}{% set turns = messages %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n\\n' }}"
        "{{ told + '<|eot_id|>' }}{% for m in turns %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    # Refuses a system message, and roles that do not alternate.
    "gemma2": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}"
        + ALTERNATE
        + "{% set role = 'model' if m['role'] == 'assistant' else 'user' %}"
        "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    # Puts the system message before the first turn itself.
    "gemma3": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{% set before = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}"
        "{% else %}{% set before = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}"
        + ALTERNATE
        + "{% set role = 'model' if m['role'] == 'assistant' else 'user' %}"
        "{{ '<start_of_turn>' + role + '\\n' + (before if loop.first else '') + m['content'] | trim }}"
        "{{ '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    # Knows two roles, and asks for an answer in the user's own turn.
    "mistral1": (
        "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
        "{{ m['content'] + eos_token + ' ' }}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    # Puts the system message before the last question.
    "mistral3": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set told = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}"
        "{% else %}{% set told = '' %}{% set turns = messages %}{% endif %}"
        "{{ bos_token }}{% for m in turns %}" + ALTERNATE + "{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + (told if loop.last else '') + m['content'] + '[/INST]' }}{% else %}"
        "{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
    ),
    # Opens <think> before every answer, and takes it out of earlier ones.
    "r1_distill": (
        "{% set ns = namespace(told='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{% set ns.told = m['content'] %}{% endif %}{% endfor %}{{ bos_token }}{{ ns.told }}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
        "{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{ '<|Assistant|>' + content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
    ),
    # The first one of Phi-3: leaves a system message out without a word.
    "phi3": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '<|user|>\\n' + m['content'] + '<|end|>\\n<|assistant|>\\n' }}{% elif m['role'] == 'assistant' %}"
        "{{ m['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"
    ),
    # Of no model that we know: begins twice.
    "begins_twice": "{{ bos_token }}{{ bos_token }}" + CHATML,
    # Of no model that we know: takes our own thinking out of earlier answers.
    "strips_thinking": CHATML.replace("m['content']", "m['content'].split('</thinking>')[-1]"),
}
