"""Train the embedded models, from nothing, on the embedded corpus. The same command goes on after a kill.

    python -m qkscope.embedded.train stories-gpt2 --out build/stories-gpt2
    python -m qkscope.embedded.train stories-llama --out build/stories-llama

Notable:
- Both are plain transformers models, 4 layers x 128 wide x 8 heads: GPT-2 with learned positions; Llama with a rotary
  embedding and four key-value heads. 16 numbers a head: small enough that importance is exact (pairs/importance.py).
- Matrices learn by Muon (Jordan et al. 2024), embeddings, gains and biases by Adam; linear warm-up, then linear decay.
- No document is seen twice: the corpus has no end, and held-out text is told apart by its content.
- OUT ends with the model (float16), its tokenizer and skills.json, what it can do on held-out text.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ..config import DataConfig
from ..data import Sequences
from ..files import read_tensors, write_json, write_tensors
from . import LAYERS
from .skills import skills
from .tokenizer import make_tokenizer

CONTEXT, WIDTH, HEADS = 256, 128, 8
WARMUP = 100  # steps
ADAM_RATE, MUON_RATE = 3e-3, 2e-2


def new_model(name: str, tokenizer: Any) -> Any:
    """The untrained model of this name."""
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": True,
    }  # fmt: skip
    if name == "stories-gpt2":
        return GPT2LMHeadModel(GPT2Config(
            n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0,
            **common,
        ))  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2, max_position_embeddings=CONTEXT, **common,
    ))  # fmt: skip


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, Adam for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and (".h." in n or ".layers." in n)]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, momentum=0.95),
        torch.optim.Adam(rest, lr=ADAM_RATE, betas=(0.9, 0.98)),
    ]


def train(name: str, out: Path, *, tokens: int, batch_tokens: int, seed: int, save_seconds: float = 120.0) -> None:
    """Train the model `name` into the folder `out`, or go on with what is there."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(CONTEXT)
    model = new_model(name, tokenizer)
    learning = optimizers(model)
    data = DataConfig(source="embedded", context=CONTEXT)
    text = Sequences(data, tokenizer, "train", batch_tokens=batch_tokens, seed=seed, repeat=True)
    checkpoint = out / "training.safetensors"
    step, seen, loss_sum, counted, clock, saved = 0, 0, 0.0, 0, time.monotonic(), time.monotonic()
    if checkpoint.exists():
        tensors, at = read_tensors(checkpoint)
        _restore(model, learning, tensors)
        text.restore(at["text"])
        step, seen = at["step"], at["tokens"]
    while seen < tokens:
        batch = next(text)
        factor = min((step + 1) / WARMUP, max(1 - seen / tokens, 0.01))
        for optimizer in learning:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("peak", group["lr"]) * factor
        logits = model(batch.tokens_BT, use_cache=False).logits[:, :-1]
        target = batch.tokens_BT[:, 1:].masked_fill(~batch.real_BT[:, 1:], -100)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten())
        loss.backward()
        for optimizer in learning:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + batch.n_tokens
        loss_sum, counted = loss_sum + float(loss.detach()), counted + 1
        if step % 50 == 0:
            print(f"step {step:,}  {seen:,} tokens  loss {loss_sum / counted:.4f}  "
                  f"{counted * batch_tokens / (time.monotonic() - clock):,.0f} tokens/s", flush=True)  # fmt: skip
            loss_sum, counted, clock = 0.0, 0, time.monotonic()
        if time.monotonic() - saved > save_seconds:
            write_tensors(checkpoint, _state(model, learning), {"step": step, "tokens": seen, "text": text.state()})
            saved = time.monotonic()
    finish(model.eval(), tokenizer, out, {"name": name, "tokens": seen, "steps": step, "seed": seed})


def finish(model: Any, tokenizer: Any, out: Path, facts: dict[str, Any]) -> None:
    """Write the model as it ships, and what it can do after the rounding to float16."""
    model = model.half()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    found = skills(model.float(), tokenizer)
    write_json(out / "skills.json", {**facts, "parameters": model.num_parameters(), "skills": found})
    (out / "training.safetensors").unlink(missing_ok=True)
    print(json.dumps({name: figure["mean"] for name, figure in found.items()}, indent=1))


def _state(model: torch.nn.Module, learning: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    # Tied weights are one tensor under two names, which the file's format does not take.
    tensors = {f"model|{name}": p.detach() for name, p in model.named_parameters()}
    for number, optimizer in enumerate(learning):
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{number}|{index}|{key}": torch.as_tensor(value) for key, value in moments.items()}
    return tensors


def _restore(model: torch.nn.Module, learning: list[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model|{name}"])
    for number, optimizer in enumerate(learning):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            first, index, *rest = name.split("|")
            if first == str(number):
                state.setdefault(int(index), {})[rest[0]] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("stories-gpt2", "stories-llama"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=14_000_000)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args.name, args.out, tokens=args.tokens, batch_tokens=args.batch_tokens, seed=args.seed)


if __name__ == "__main__":
    main()
