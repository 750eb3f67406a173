"""Requests that join and leave a running batch get the tokens that PEFT gives them alone."""

from bdlora_compile.serving.engine import Engine
from bdlora_compile.serving.requests import Request, SamplingParams
from tests.serving.conftest import World

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def test_tokens_equal_those_alone(engine: Engine, world: World) -> None:
    """Nine requests over three rows and two slots: prompts of one token, of many, each adapter and none."""
    prompts = [(5,), (5, 9), tuple(range(3, 33)), (7, 7, 7, 9, 100, 4)]
    requests = [Request(prompts[index % 4], [*world.paths, None][index % 5], GREEDY) for index in range(9)]
    streams = [engine.submit(request) for request in requests]
    for request, stream in zip(requests, streams, strict=True):
        completion = stream.result(30)
        assert completion.ids == world.alone(request.prompt, request.adapter, 8)
        assert completion.finished.reason == "length"
        assert completion.text == world.tokenizer.decode(completion.ids, skip_special_tokens=True)
