"""Which code is taken from an answer that holds more than the function that was asked for."""

from __future__ import annotations

import pytest

from backmerge.benchmarks.code_blocks import extract_code

DEFINITION = "def add_up(numbers):\n    return sum(numbers)\n"
FENCED = f"```python\n{DEFINITION}```"
DOCSTRING = (
    'def add_up(numbers):\n    """Add up.\n\n{fence}\n    >>> add_up([1])\n{fence}\n    """\n    return sum(numbers)\n'
)
ANSWERS = {
    "an example of use first": f"Use it so:\n```python\nprint(add_up([1, 2]))\n```\nThe function:\n{FENCED}",
    "an example of use last": f"{FENCED}\nUse it so:\n```python\nprint(add_up([1, 2]))\n```\n",
    "pip without a language first": f"```\npip install numpy\n```\n{FENCED}",
    "a shell's block first": f"```bash\npip install numpy\n```\n{FENCED}",
    "output last": f"{FENCED}\nIt prints:\n```\n3\n```",
    "a helper that is not used first": f"```python\ndef helper(x):\n    return x\n```\n{FENCED}",
    "a helper that is used first": "```python\nimport math\n\ndef total(x):\n    return int(math.fsum(x))\n```\n"
    "```python\ndef add_up(numbers):\n    return total(numbers)\n```",
    "a helper that is used last": "```python\ndef add_up(numbers):\n    return total(numbers)\n```\nwith\n"
    "```python\ndef total(x):\n    return sum(x)\n```",
    "a draft first": f"```python\ndef add_up(numbers):\n    return 0\n```\nNo, better:\n{FENCED}",
    "another version that the limit cut": f"{FENCED}\nor\n```python\ndef add_up(numbers):\n    return (",
    "a thought with a draft": f"<think>\n```python\ndef add_up(n):\n    return 1\n```\n</think>\n{FENCED}",
    "a thought that the prompt opened": f"```python\nx = numbers[0]\n```\n</think>\n{FENCED}",
    "a body in a block": "The body:\n```python\n    return sum(numbers)\n```",
    "a body after a shell's line": "```\npip install numpy\n```\n```python\n    return sum(numbers)\n```",
    "tildes": f"~~~python\n{DEFINITION}~~~",
    "no fence, prose around": f"The function is this:\n\n{DEFINITION}\nIt adds all numbers.\nThat is all.",
    "no fence, imports and prose": f"Here you are.\nimport math\n\n{DEFINITION}Done!",
    "a fence in a docstring, indented": "```python\n" + DOCSTRING.format(fence="    ```") + "```",
    "a fence in a docstring, at the margin": "```python\n" + DOCSTRING.format(fence="```") + "```\nDone.",
    "a fence in a docstring, two spaces": "```python\n" + DOCSTRING.format(fence="  ```") + "```",
    "a fence in a docstring of bare code": DOCSTRING.format(fence="    ```"),
    "a fence in a docstring of a bare body": '    """Add.\n    ```\n    x\n    ```\n    """\n    return sum(numbers)\n',
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_the_function_is_found_whatever_is_around_it(answer: str) -> None:
    """Run in our own process, since we wrote it: the right function comes out of each answer."""
    code = extract_code(answer, "add_up")
    source = code if "def add_up" in code else f"def add_up(numbers):\n{code}"
    names: dict[str, object] = {}
    exec(compile(source, "answer", "exec"), names)  # noqa: S102  # our own text
    add_up = names["add_up"]
    assert callable(add_up)
    assert add_up([1, 2]) == 3


def test_the_last_definition_counts_even_if_it_is_wrong() -> None:
    """An earlier right version does not rescue a wrong last word."""
    wrong = "def add_up(numbers):\n    return 0\n"
    assert extract_code(f"{FENCED}\nBetter:\n```python\n{wrong}```", "add_up") == wrong


def test_helpers_of_other_blocks_are_taken_with_their_decorators() -> None:
    """What the function uses is put in front once, and nothing else of those blocks."""
    helper = "import functools\n@functools.cache\ndef total(x):\n    return sum(x)\nprint('example')\n"
    code = extract_code(f"```python\n{helper}```\n```python\ndef add_up(n):\n    return total(tuple(n))\n```", "add_up")
    assert code == helper.replace("print('example')\n", "") + "def add_up(n):\n    return total(tuple(n))\n"
