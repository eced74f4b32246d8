"""docs/tour.md is what docs/make_tour.py makes: its code is the code of today, its numbers are those of a run."""

import re

import pytest

from docs import make_tour

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?")


def page() -> str:
    return (make_tour.ROOT / "docs" / "tour.md").read_text(encoding="utf-8")


def differences(old: str, new: str) -> list[str]:
    """Numbers of two texts that differ by more than 2 percent and 0.02, or a line whose words differ."""
    found = []
    for one, other in zip(old.splitlines(), new.splitlines(), strict=True):
        if NUMBER.sub("", one) != NUMBER.sub("", other):
            found.append(other)
            continue
        pairs = zip(map(float, NUMBER.findall(one)), map(float, NUMBER.findall(other)), strict=True)
        found += [
            f"{a} is now {b}: {one}"
            for a, b in pairs
            if abs(a - b) > 0.02 * max(abs(a), abs(b)) + 0.02 * (abs(a) > 1e-2)
        ]
    return found


def test_the_code_in_the_tour_is_that_of_the_files():
    text, blocks = page(), make_tour.code_blocks()
    assert len(blocks) >= 12
    for block in blocks:
        assert block in text, f"run python docs/make_tour.py: the tour has an older version of\n{block}"


def test_every_equation_is_in_the_tour():
    code = "\n".join(make_tour.code_blocks())
    assert [n for n in (1, 2, 3, 4, 5) if f"# Eq. ({n})" not in code] == []


def test_an_excerpt_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="refl.py has no lost"):
        make_tour.excerpt("refl.py", "lost")
    with pytest.raises(ValueError, match="refl_loss has no line with 'lost'"):
        make_tour.excerpt("refl.py", "refl_loss", "t_f = ", "lost")


def test_differences_are_found():
    assert differences("loss 0.312, t_f 34\nb", "loss 0.313, t_f 34\nb") == []
    assert len(differences("loss 0.312, t_f 34\nb", "loss 0.352, t_f 31\nc")) == 3


@pytest.mark.slow
def test_the_numbers_of_the_tour_are_those_of_a_run(tmp_path, monkeypatch):
    template = (make_tour.TOUR / "template.md").read_text(encoding="utf-8")
    (tmp_path / "template.md").write_text(template, encoding="utf-8")
    monkeypatch.setattr(make_tour, "TOUR", tmp_path)
    assert differences(page(), make_tour.render(make_tour.measure())) == []
    assert len(list(tmp_path.glob("*.png"))) == template.count("](tour/")
