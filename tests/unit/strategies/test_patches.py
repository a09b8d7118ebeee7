from __future__ import annotations

from resist_lightning.strategies.patches import Patches, after


class Loop:
    def run(self) -> str:
        return "usual"


def test_what_was_replaced_twice_is_put_back_and_a_class_keeps_its_method() -> None:
    loop, patches = Loop(), Patches()
    usual = Loop.run
    patches.replace(loop, "run", lambda: "first")
    patches.replace(loop, "run", lambda: "second")
    patches.replace(Loop, "run", lambda self: "of the class")
    assert (loop.run(), Loop().run()) == ("second", "of the class")

    patches.remove()
    patches.remove()  # a second time does nothing

    assert loop.run() == "usual"
    assert "run" not in vars(loop)
    assert Loop.run is usual


def test_after_calls_first_and_returns_the_usual_result() -> None:
    said: list[str] = []

    def usual(name: str, *, loud: bool) -> str:
        said.append("usual")
        return f"{name}, {loud}"

    assert after(lambda: said.append("first"), usual)("name", loud=True) == "name, True"
    assert said == ["first", "usual"]
