"""`generate` of transformers, one batch of completions a round; runs in this project's environment.

The samples of a prompt are rows of one batch with a shared setting and no end token.
"""

import numpy as np
import torch
from rounds import Rounds, read_spec
from torch_train import load


def main() -> None:
    spec, rounds = read_spec(), Rounds()
    torch.set_num_threads(spec["threads"])
    model = load(spec).eval()
    tokens = torch.from_numpy(np.load(spec["tokens"])["prompt"].astype(np.int64)).to(spec["device"])
    while True:
        rounds.wait()
        with torch.no_grad():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=spec["group"],
                max_new_tokens=spec["new"],
                min_new_tokens=spec["new"],
                pad_token_id=0,
            )
        rounds.done(tokens=out[:, tokens.shape[1] :].cpu().numel())  # on the host: a GPU is done by then


if __name__ == "__main__":
    main()
