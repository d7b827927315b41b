from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from adapterkit.training.config import Section, check_section
from adapterkit.training.samples.prompts import Prompts, samples_of
from adapterkit.training.samples.sample import Sample, sample_name


class Options(Section):
    prompts: Prompts = Field([])


def read(value: Any) -> list[Sample]:
    return samples_of(Options(prompts=value).prompts, [7, 8])


def problems(value: Any) -> list[str]:
    found: list[str] = []
    check_section(Options, {"prompts": value}, found)
    return found


def test_a_list_may_mix_texts_and_settings():
    found = read(["one", {"prompt": "two", "seed": [1, 2], "size": [8, 16], "guidance": 4, "weight": 0.5}])
    assert found == [
        Sample("one", 7),
        Sample("one", 8),
        Sample("two", 1, size=(8, 16), guidance=4.0, weight=0.5, number=1),
        Sample("two", 2, size=(8, 16), guidance=4.0, weight=0.5, number=1),
    ]
    assert [sample_name(3, one, ".png") for one in found[1:3]] == ["step_000003_p0_s8.png", "step_000003_p1_s1.png"]
    assert found[3].label == "two (seed 2, 8x16, guidance 4.0, weight 0.5)"


def test_a_text_file_has_a_prompt_a_line_with_the_scripts_flags(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    lines = [
        "# what to draw",
        "a cat, ink -- dashes stay",
        "",
        "a dog --n bad, ugly --w 512 --h 768 --d 3 --s 28 --l 7.5",
    ]
    path.write_text("\n".join([*lines, "a fox --am 0.7"]), encoding="utf-8-sig")
    assert read(str(path)) == [
        Sample("a cat, ink -- dashes stay", 7),
        Sample("a cat, ink -- dashes stay", 8),
        Sample("a dog", 3, "bad, ugly", (768, 512), 28, 7.5, number=1),
        Sample("a fox", 7, weight=0.7, number=2),
        Sample("a fox", 8, weight=0.7, number=2),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", '{"prompt": "two", "seed": 4, "steps": 5}\n\n"three"\n'),
        ("p.yaml", "- {prompt: two, seed: 4, steps: 5}\n- three\n"),
        ("p.json", '[{"prompt": "two", "seed": 4, "steps": 5}, "three"]'),
    ],
)
def test_other_files_say_the_same(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text)
    assert read(str(tmp_path / name)) == [
        Sample("two", 4, steps=5),
        Sample("three", 7, number=1),
        Sample("three", 8, number=1),
    ]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.txt", "a\nb --q 3", "line 2: unknown flag --q; there are --n (negative), --w"),
        ("p.txt", "a --s many", "line 1: --s must be a number, not 'many'"),
        ("p.txt", "a --w 64", "line 1: --w and --h belong together"),
        ("p.txt", "# nothing\n", "holds no prompt"),
        ("p.jsonl", '"one"\n{', "line 2 is no JSON"),
        ("p.yaml", "prompt: a", "must hold a list of prompts, not dict"),
        ("p.yaml", "- a\n- {prompt: a, seeed: 1}", "p.yaml, prompt 2: unknown key 'seeed'. Did you mean 'seed'?"),
        (
            "p.txt",
            "a\n\nb --w 0 --h 64",
            "p.txt, line 3: size: must be a side in pixels, or [height, width], not [64",
        ),
        ("p.jsonl", '"a"\n{"prompt": "b", "size": "large"}', "p.jsonl, line 2: size: must be a side in pixels"),
        ("p.jsonl", "3", "p.jsonl, line 1 must be a text, or keys such as prompt and seed, not 3"),
        ("p.md", "a", "must end in .txt, .jsonl"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_line(tmp_path: Path, name: str, text: str, told: str):
    (tmp_path / name).write_text(text)
    [problem] = problems(str(tmp_path / name))
    assert told in problem
    assert not problem.endswith(f"not {str(tmp_path / name)!r}")


def test_what_is_no_prompt_is_told(tmp_path: Path):
    path = str(tmp_path / "absent.txt")
    assert problems(path) == [f"prompts: cannot be read (No such file or directory): {path}"]
    assert problems([3]) == ["prompts.0: input should be a valid dictionary or instance of Prompt, not 3"]
    assert "prompts.0.steps: input should be greater than 0" in problems([{"prompt": "a", "steps": 0}])[0]
    assert "prompts.0.seed" in problems([{"prompt": "a", "seed": 2**63}])[0]


def test_what_is_written_is_what_was_read(tmp_path: Path):
    given = ["one", {"prompt": "two", "seed": 3, "size": 16}]
    written = Options(prompts=given).model_dump(mode="json")["prompts"]  # type: ignore[arg-type]
    assert written == given
    assert read(written) == read(given)
