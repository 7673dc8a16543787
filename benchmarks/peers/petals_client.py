"""What runs inside a Python that has Petals: `petals_client.py MODEL_FOLDER CONTEXT PEER...`. Imports nothing of ours.

Reads one JSON request per line, {"prompt": ids, "count": n}; writes a line "token ID" as each comes, "error ..." where
Petals gives up, "done" at the end.
"""

import json
import os
import sys

os.environ["BITSANDBYTES_NOWELCOME"] = "1"


def client(folder: str, context: int, peers: list[str]) -> None:
    import torch
    from petals import AutoDistributedModelForCausalLM  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        folder, initial_peers=peers, dht_prefix="benchmark", torch_dtype=torch.float32, max_retries=3
    )
    say("ready")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            ids = torch.tensor([request["prompt"]])
            with torch.inference_mode(), model.inference_session(max_length=context):
                for _ in range(request["count"]):
                    logits = model(ids).logits[0, -1]
                    ids = logits.argmax()[None, None]
                    say(f"token {int(ids)}")
            say("done")
        except Exception as error:
            say(f"error {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def say(text: str) -> None:
    print(text, file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    client(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
