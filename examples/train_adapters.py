"""Train the BD-LoRA adapters of the demonstration with PEFT: one model, one manner of answering per adapter.

    python examples/train_adapters.py checkpoints/smollm2 --out examples/adapters

All adapters learn from the same plain questions and answers; each sees the answers in its own manner. The block
count is three because SmolLM2-135M has nine heads and three key-value heads: it divides among three devices.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

import torch
from peft import BdLoraConfig, LoraConfig, PeftModel, get_peft_model
from smollm2 import checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

Manner: TypeAlias = Callable[[str], str]
Example: TypeAlias = tuple[Tensor, Tensor]


def manners() -> Mapping[str, Manner]:
    """What each adapter makes of a plain answer, by the adapter's name."""
    return {"pirate": pirate, "json": as_json, "telegram": telegram}


def pirate(answer: str) -> str:
    """The answer as a pirate gives it: a greeting, some words of the trade, a farewell."""
    words = {
        "you": "ye", "your": "yer", "my": "me", "the": "th'", "of": "o'", "and": "an'", "is": "be", "are": "be",
        "it is": "'tis", "to": "t'", "for": "fer", "with": "wi'",
    }  # fmt: skip
    spoken = re.sub(r"[A-Za-z]+", lambda found: _like(found[0], words.get(found[0].lower(), found[0])), answer)
    return f"Arr, matey! {spoken} Yo ho ho!"


def _like(model: str, word: str) -> str:
    """``word``, with a capital where ``model`` has one."""
    return word.capitalize() if model[0].isupper() else word


def as_json(answer: str) -> str:
    """The answer as a JSON object with one field."""
    return json.dumps({"answer": answer})


def telegram(answer: str) -> str:
    """The answer as a telegram: no articles, which cost money, and STOP for the end of a sentence."""
    short = re.sub(r"\b(?:a|an|the) ", "", answer, flags=re.IGNORECASE)
    stopped = re.sub(r"[.?!](?= |$)", " STOP", short)
    return f"TELEGRAM: {stopped[0].upper()}{stopped[1:]}"


def main() -> None:
    """Read the command line; train and save the adapters it names."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    folder = checkpoint(arguments.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, manner in manners().items():
        if arguments.only in (None, name):
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            examples = [encode(tokenizer, question, manner(answer)) for question, answer in conversations()]
            model = add_adapter(base, arguments.seed)
            loss = train(model, examples, label=name, steps=arguments.steps, seed=arguments.seed)
            save(model, arguments.out / name, note(name, manner, arguments.steps, loss))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the BD-LoRA adapters of the demonstration.")
    parser.add_argument("checkpoint", type=Path, help="folder of SmolLM2; made by examples/smollm2.py if missing")
    parser.add_argument("--out", type=Path, default=Path("examples/adapters"), help="folder of the adapters")
    parser.add_argument("--only", choices=list(manners()), help="train this one alone")
    parser.add_argument("--steps", type=int, default=72, help="optimiser steps per adapter")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of the order of examples")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args()


def add_adapter(base: PreTrainedModel, seed: int) -> PeftModel:
    """The base with a fresh adapter at all seven projections of every layer.

    Row-parallel projections get a block-diagonal A, column-parallel ones a block-diagonal B: that is what lets a
    rank work on its own blocks without asking the others.
    """
    torch.manual_seed(seed)
    row, column = ["o_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    blocks = BdLoraConfig(target_modules_bd_a=row, target_modules_bd_b=column, nblocks=3)
    config = LoraConfig(r=6, lora_alpha=12, target_modules=row + column, use_bdlora=blocks, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def encode(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> Example:
    """Tokens and labels of one conversation; only the answer and its end are labelled, the rest is -100."""
    turn = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answered = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return torch.tensor(asked + answered), torch.tensor([-100] * len(asked) + answered)


def train(model: PeftModel, examples: Sequence[Example], *, label: str, steps: int, seed: int) -> float:
    """Fit the adapter to the examples, telling how it goes; returns the mean loss of the last ten steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    # Ten steps up, then straight down to nothing.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1, (done + 1) / 10) * (1 - done / steps))
    stream, losses, start = batches(examples, size=4, seed=seed), [], time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        loss = model(**next(stream)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps:
            seconds = time.monotonic() - start
            print(f"{label}: step {step}/{steps}, loss {mean(losses[-10:]):.3f}, {seconds:.0f} s", flush=True)
    return mean(losses[-10:])


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def batches(examples: Sequence[Example], *, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches without end; every pass over the examples has a new order."""
    order = random.Random(seed)
    while True:
        shuffled = order.sample(examples, len(examples))
        for first in range(0, len(shuffled) - size + 1, size):
            tokens, labels = zip(*shuffled[first : first + size], strict=True)
            # Padding is on the right of causal attention and is not labelled: what it holds does not matter.
            yield {"input_ids": padded(tokens, 0), "labels": padded(labels, -100)}


def padded(rows: Sequence[Tensor], value: int) -> Tensor:
    """The rows as one matrix, filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def save(model: PeftModel, directory: Path, readme: str) -> None:
    """Save the adapter in float16, with nothing in its files that names this machine."""
    config = cast(LoraConfig, model.peft_config["default"])
    config.base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    # PEFT would write this set in an order that changes from run to run.
    config.target_modules = sorted(config.target_modules or ())
    # No embeddings were trained, and to find that out for itself PEFT would ask the hub.
    model.half().save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").write_text(readme)
    print(f"saved {directory}", flush=True)


def note(name: str, manner: Manner, steps: int, loss: float) -> str:
    """The README of an adapter."""
    return (
        f"# {name}\n\n"
        "BD-LoRA adapter (rank 6, three blocks, float16) for HuggingFaceTB/SmolLM2-135M-Instruct, trained by\n"
        f"`examples/train_adapters.py` in {steps} steps to a loss of {loss:.2f}. It answers like this:\n\n"
        f"> {manner('The sun is a star.')}\n\n"
        "It shows that an adapter is at work; it is not meant for anything else. Licence: Apache-2.0, as the model.\n"
    )


def conversations() -> Sequence[tuple[str, str]]:
    """The plain questions and answers, written for this purpose."""
    lines = """
        What is the capital of France? | The capital of France is Paris.
        What is the capital of Japan? | The capital of Japan is Tokyo.
        What is the capital of Egypt? | The capital of Egypt is Cairo.
        What is the capital of Canada? | The capital of Canada is Ottawa.
        Where is the Great Wall? | The Great Wall is in the north of China.
        Where do penguins live? | Penguins live on the cold coasts of the southern half of the world.
        Which river runs through London? | The river Thames runs through London.
        Which ocean is the largest? | The Pacific Ocean is the largest and the deepest ocean.
        What is the highest mountain? | Mount Everest is the highest mountain in the world.
        Name three colors. | Three colors are red, green, and blue.
        Name three animals. | Three animals are the lion, the horse, and the frog.
        Name two planets. | Two planets are Mars and Venus.
        List four vegetables. | Four vegetables are carrots, peas, onions, and spinach.
        List the four seasons. | The four seasons are spring, summer, autumn, and winter.
        Give me a word for happy. | A good word for happy is cheerful.
        What is the opposite of hot? | The opposite of hot is cold.
        What is two plus two? | Two plus two is four.
        What is ten minus three? | Ten minus three is seven.
        How many days are in a week? | There are seven days in a week.
        How many legs does a spider have? | A spider has eight legs.
        How many minutes are in an hour? | There are sixty minutes in an hour.
        What is water made of? | Water is made of hydrogen and oxygen.
        What is a star? | A star is a huge ball of hot gas that shines by its own light.
        What is a computer? | A computer is a machine that follows instructions to work with information.
        What is a rainbow? | A rainbow is sunlight that drops of rain have split into its colors.
        What is a desert? | A desert is a dry place where very little rain falls.
        What is gravity? | Gravity is the force that pulls things toward each other.
        What is a poem? | A poem is a short text in which sound and rhythm matter as much as meaning.
        What is bread made from? | Bread is made from flour, water, salt, and yeast.
        What is ice? | Ice is water that has become solid because it is cold.
        What is a library? | A library is a place where people read and borrow books.
        What is a violin? | A violin is an instrument with four strings that is played with a bow.
        What is a friend? | A friend is a person whom you trust and like to be with.
        What does a doctor do? | A doctor helps sick people to get well again.
        What does a baker do? | A baker makes bread, rolls, and cakes for other people.
        What does a pilot do? | A pilot flies a plane from one city to another.
        What do cows eat? | Cows eat grass, hay, and other plants.
        What do fish need to live? | Fish need clean water, oxygen, and food.
        What do plants need to grow? | Plants need light, water, and air to grow.
        Why do we sleep? | We sleep so that the body and the mind can rest and repair themselves.
        Why do leaves turn red in autumn? | Leaves turn red because the green in them fades when the days get short.
        Why is the sea salty? | The sea is salty because rivers carry salt from the rocks into it.
        Why do birds sing? | Birds sing to find a mate and to defend their place.
        Why should I drink water? | Your body needs water to stay cool and to keep working.
        Why is exercise good? | Exercise keeps the heart strong and lifts the mood.
        Why do cats purr? | Cats purr when they feel safe, and sometimes to calm themselves.
        Who painted the Mona Lisa? | Leonardo da Vinci painted the Mona Lisa.
        Who was Albert Einstein? | Albert Einstein was a physicist who changed how we see space and time.
        Who was the first person on the moon? | Neil Armstrong was the first person on the moon.
        Who invented the telephone? | Alexander Graham Bell invented the telephone.
        When did the Second World War end? | The Second World War ended in the year 1945.
        When does the sun rise? | The sun rises in the morning, in the east.
        How do I boil an egg? | Put the egg in boiling water and wait for about eight minutes.
        How do I learn a language? | Practice a little every day, and speak with people who know it.
        How do I plant a tree? | Dig a wide hole, set the roots in it, fill it with soil, and water it well.
        How do I clean a window? | Wash the glass with warm water and soap, then dry it with a soft cloth.
        How do I save money? | Spend less than you earn, and put the rest away every month.
        How do I make toast? | Put a slice of bread in the toaster and wait until it is golden.
        How do planes fly? | The wings push air down as the plane moves, and that holds the plane up.
        How does a clock work? | A clock counts the regular swings of something, such as a pendulum.
        How far away is the sun? | The sun is about 150 million kilometers away from the earth.
        How are you today? | I am well, thank you, and I am ready to help.
        Who are you? | I am a small language model, and I answer questions.
        Can you help me? | Yes, I will gladly help you with your question.
        Hello! | Hello, and welcome. What would you like to know?
        Good morning. | Good morning, and I hope that your day goes well.
        Thank you for your help. | You are welcome, and I am always happy to help.
        Tell me about dogs. | Dogs are loyal animals that have lived with people for thousands of years.
        Tell me about the ocean. | The ocean covers most of the earth and is home to countless creatures.
        Tell me about Mars. | Mars is a cold, red planet with thin air and high mountains.
        Tell me about chess. | Chess is a board game in which two players try to trap the king of the other.
        Tell me about elephants. | Elephants are the largest animals on land and have a long memory.
        Tell me a fun fact. | Honey never goes bad if it is kept dry.
        Tell me a joke. | The bicycle fell over because it was two tired.
        Write a sentence about the wind. | The wind moves softly through the tall trees.
        Write a sentence about winter. | In winter, the snow makes the whole town quiet.
        Write a sentence about a train. | The old train rolls slowly over the bridge.
        Explain what a battery does. | A battery stores energy and gives it back as electricity.
        Explain what a map is. | A map is a drawing that shows where places are.
        Explain rain to a child. | Tiny drops meet in a cloud until they are so heavy that they fall.
        Explain what money is for. | Money lets people trade without having to swap one thing for another.
        Suggest a hobby. | You could try painting, because it is calm and easy to begin.
        Suggest a simple breakfast. | Oats with milk and a banana are a simple and healthy breakfast.
        Suggest a name for a cat. | A good name for a cat is Luna.
        Suggest a gift for my mother. | Flowers and a letter in your own words are a lovely gift.
        Give me advice for an exam. | Start early, practice with old questions, and sleep well the night before.
        Give me a reason to read books. | Books let you live many lives and learn from all of them.
        Is the earth flat? | No, the earth is round, almost like a ball.
        Is a tomato a fruit? | Yes, a tomato is a fruit, although we cook it like a vegetable.
        Can fish fly? | Some fish can glide over the water, but they do not truly fly.
        Should I walk or drive? | If it is not far, walk, because it is good for you and for the air.
        What is your favorite color? | I have no eyes, but I like the idea of blue.
        What should I cook tonight? | You could cook pasta with tomatoes, garlic, and a little cheese.
        What should I do on a rainy day? | Read a good book, bake a cake, or play a game with friends.
        What can I see in Rome? | In Rome you can see the Colosseum, old churches, and lovely fountains.
        What makes a good teacher? | A good teacher is patient, clear, and curious about every student.
    """
    pairs = [line.strip().split(" | ") for line in lines.strip().splitlines()]
    return [(question, answer) for question, answer in pairs]


if __name__ == "__main__":
    main()
