"""A plain server: FastAPI around ``generate``, adapters through PEFT; one process.

python before.py MODEL math=adapters/math chat=adapters/chat
curl localhost:8000/generate -H 'content-type: application/json' -d '{"prompt": "2 + 2 =", "adapter": "math"}'
"""

import sys
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from peft import PeftModel
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer


class Question(BaseModel):
    """What a client asks."""

    prompt: str
    adapter: str
    max_new_tokens: int = 64


def load(path: str, folders: dict[str, str]) -> tuple[Any, Any]:
    """The model, and the names of its adapters."""
    names = list(folders)
    plain = AutoModelForCausalLM.from_pretrained(path)
    model: Any = PeftModel.from_pretrained(plain, folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folders[name], adapter_name=name)
    return model, names


def make_app(model: Any, adapters: Any, tokenizer: Any) -> FastAPI:
    """The routes."""
    app = FastAPI()
    lock = threading.Lock()

    @app.post("/generate")
    def generate(question: Question) -> str:
        if question.adapter not in adapters:
            raise HTTPException(404, f"no adapter {question.adapter!r}")
        batch = tokenizer(question.prompt, return_tensors="pt").to(model.device)
        with lock:
            model.set_adapter(question.adapter)
            tokens = model.generate(**batch, max_new_tokens=question.max_new_tokens, do_sample=False)
        return str(tokenizer.decode(tokens[0, batch.input_ids.shape[1] :], skip_special_tokens=True))

    return app


def main(path: str, *pairs: str) -> None:
    """Serve on port 8000."""
    model, adapters = load(path, dict(pair.split("=", 1) for pair in pairs))
    app = make_app(model, adapters, AutoTokenizer.from_pretrained(path))
    uvicorn.run(app, port=8000)


if __name__ == "__main__":
    main(*sys.argv[1:])
