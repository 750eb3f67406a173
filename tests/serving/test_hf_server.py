"""The example servers answer alike, and the documentation shows what tells them apart."""

import difflib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import AdapterSpec, save_adapter, save_model
from tests.serving.conftest import SPEC

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "hf_server"


def test_the_documented_difference_is_the_real_one() -> None:
    """docs/serving-engine.md shows the diff of the two files."""
    before, after = ((EXAMPLES / name).read_text().splitlines() for name in ("before.py", "after.py"))
    lines = difflib.unified_diff(before, after, "before.py", "after.py", n=1, lineterm="")
    shown = "\n".join(line.rstrip() for line in lines)
    assert f"```diff\n{shown}\n```" in (ROOT / "docs" / "serving-engine.md").read_text()


def test_both_answer_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts for the same questions, sent at the same time, in float32; unknown adapters are 404."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    torch._dynamo.reset()
    model = save_model(SPEC, tmp_path / "model")
    letters = {chr(97 + index): 3 + index for index in range(SPEC.vocabulary - 3)}
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **letters}, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    folders = {
        name: str(save_adapter(AdapterSpec(rank=4, nblocks=2 * seed), model, tmp_path / name, seed))
        for seed, name in enumerate("ab")
    }
    questions = [
        {"prompt": prompt, "adapter": name, "max_new_tokens": 5} for prompt in ("abc", "hello") for name in "ab"
    ]
    answers = []
    for kind in ("before", "after"):
        example = __import__(kind)
        with TestClient(example.make_app(*example.load(str(model), folders), tokenizer)) as client:
            with ThreadPoolExecutor(4) as pool:
                replies = list(pool.map(lambda body: client.post("/generate", json=body), questions))
            assert [reply.status_code for reply in replies] == [200] * 4
            answers.append([reply.json() for reply in replies])
            assert client.post("/generate", json={"prompt": "a", "adapter": "nobody"}).status_code == 404
        del sys.modules[kind]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 4
