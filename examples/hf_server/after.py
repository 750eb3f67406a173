"""The same server on N ranks; requests with different adapters run beside each other.

torchrun --nproc-per-node 2 after.py MODEL math=adapters/math chat=adapters/chat
curl localhost:8000/generate -H 'content-type: application/json' -d '{"prompt": "2 + 2 =", "adapter": "math"}'
"""

import sys
from typing import Any

import torch.distributed as dist
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from transformers import AutoTokenizer

import bdlora_compile


class Question(BaseModel):
    """What a client asks."""

    prompt: str
    adapter: str
    max_new_tokens: int = 64


def load(path: str, folders: dict[str, str]) -> tuple[Any, Any]:
    """The model, and its adapters."""
    model, adapters = bdlora_compile.load(path, folders)
    model.compile(backend="bdlora")
    return model, adapters


def make_app(model: Any, adapters: Any, tokenizer: Any) -> FastAPI:
    """The routes."""
    app = FastAPI()

    @app.post("/generate")
    def generate(question: Question) -> str:
        if question.adapter not in adapters:
            raise HTTPException(404, f"no adapter {question.adapter!r}")
        batch = tokenizer(question.prompt, return_tensors="pt").to(model.device)
        with adapters.use(question.adapter):
            tokens = model.generate(**batch, max_new_tokens=question.max_new_tokens, do_sample=False)
        return str(tokenizer.decode(tokens[0, batch.input_ids.shape[1] :], skip_special_tokens=True))

    return app


def main(path: str, *pairs: str) -> None:
    """Serve on port 8000."""
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    model, adapters = load(path, dict(pair.split("=", 1) for pair in pairs))
    app = make_app(model, adapters, AutoTokenizer.from_pretrained(path))
    with bdlora_compile.follow(model, adapters) as drives:
        if drives:
            uvicorn.run(app, port=8000)


if __name__ == "__main__":
    main(*sys.argv[1:])
