"""The field's words: no retired word is left in a text for users, and no retired module anywhere."""

import re
from pathlib import Path

import pytest

from pvae._moved import MOVED

ROOT = Path(__file__).parents[1]
FOLDERS = ("pvae", "models", "examples", "docs", "tests")
FILES = [ROOT / "README.md", *(p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*")))]
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in FILES
    if path.suffix in (".py", ".pyi", ".md", ".toml", ".jinja") and "run_of_0_1" not in path.parts
}
RETIRED = [
    r"\blam\b",
    r"sources? of (lam|q_params)",
    r"nats of (probability )?mass",
    r"below (its|their) optimum",
    r"what is there\b",
]
# Words of old modules that mean nothing else: a path `pvae.word` or `word.py` names them.
OLD = [word for word in MOVED if not (ROOT / "pvae" / word).is_dir()]


def places(pattern, texts):
    return [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]


@pytest.mark.parametrize("pattern", RETIRED)
def test_a_retired_word_is_gone(pattern):
    texts = {name: text for name, text in TEXTS.items() if not name.startswith("tests/")}
    assert not places(pattern, texts)


def test_no_text_names_a_module_that_has_moved():
    faces = {"families", "priors", "networks", "likelihoods", "objectives", "noise", "compare", "diagnose", "sklearn"}
    words = "|".join(sorted(set(OLD) - faces))
    texts = {
        name: text
        for name, text in TEXTS.items()
        if name not in ("pvae/_moved.py", "tests/test_face.py", "tests/test_words.py")
    }
    assert not places(rf"\bpvae\.({words})\b(?!\.md)|\bpvae/({words})\.py\b", texts)


def test_the_search_finds_what_it_looks_for():
    assert places(RETIRED[0], {"x": "a\nthe best lam of q"}) == ["x:2: the best lam of q"]
