"""The page as a person uses it: keys, mouse, and what is to be seen."""

import base64
from pathlib import Path
from typing import Any

import chromium

_KEYS = {
    "←": "\ue012",
    "→": "\ue014",
    "⇞": "\ue00e",
    "⇟": "\ue00f",
    "⤒": "\ue011",
    "⤓": "\ue010",
    "⏎": "\ue007",
    "⎋": "\ue00c",
}


class Page(chromium.Page):
    """`detserve view` in the window of another page."""

    def __init__(self, window: chromium.Page) -> None:
        super().__init__(window._session)

    def open(self, address: str) -> None:
        # A mere change of the fragment would not load anything.
        super().open("about:blank")
        super().open(address)
        self.settled()

    def settled(self) -> None:
        """Wait until nothing is being loaded or counted."""
        self.wait("document.body.dataset.ready === 'true' && document.body.dataset.busy === 'false'")

    def press(self, key: str) -> None:
        """Press some keys, one after the other."""
        values = [_KEYS.get(one, one) for one in key]
        actions = [{"type": kind, "value": value} for value in values for kind in ("keyDown", "keyUp")]
        self._post("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])
        self.settled()

    def click(self, selector: str) -> None:
        super().click(selector)
        self.settled()

    def focus(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0]).focus()", selector)

    def hover(self, selector: str) -> None:
        self._mouse({"type": "pointerMove", "x": 0, "y": 0, "origin": self._element(selector)})

    def point(self, x: float, y: float) -> None:
        """Move the mouse to a place in the window."""
        self._mouse({"type": "pointerMove", "x": round(x), "y": round(y)})

    def drag(self, selector: str, by: tuple[int, int]) -> None:
        """Take hold of the middle of an element, move, let go."""
        self._mouse(
            {"type": "pointerMove", "x": 0, "y": 0, "origin": self._element(selector)},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerMove", "x": by[0], "y": by[1], "origin": "pointer", "duration": 40},
            {"type": "pointerUp", "button": 0},
        )
        self.settled()

    def choose_files(self, *paths: Path) -> None:
        """As in the dialogue of the button."""
        (place,) = self._element("#file").values()
        self._post(f"element/{place}/value", text="\n".join(map(str, paths)))
        self.settled()

    def drop(self, path: Path) -> None:
        """Drop a file on the page, as from a file manager."""
        self.run(
            """const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], arguments[1]));
            for (const name of ['dragenter', 'dragover', 'drop'])
              stage.dispatchEvent(new DragEvent(name, {dataTransfer, bubbles: true, cancelable: true}));""",
            base64.b64encode(path.read_bytes()).decode(),
            path.name,
        )
        self.settled()

    def _element(self, selector: str) -> dict[str, str]:
        return self._post("element", using="css selector", value=selector)

    def _mouse(self, *actions: dict[str, Any]) -> None:
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": list(actions)}
        self._post("actions", actions=[pointer])

    def output(self, name: str) -> str:
        return self.run("return document.getElementById(arguments[0] + '-value').textContent", name)

    def place(self) -> int:
        """The number of the image in the list, from 1."""
        return int(self.run("return place.textContent").split(" of ")[0].replace(",", ""))

    def totals(self) -> dict[str, int]:
        numbers = self.run("return [...document.querySelectorAll('#totals .chip b')].map((one) => one.textContent)")
        return dict(zip(("tp", "fp", "fn"), (int(one.replace(",", "")) for one in numbers), strict=True))

    def rows(self) -> list[dict]:
        """The rows that are in the page, from the top."""
        found = self.run(
            "return [...document.querySelectorAll('.row')].map((row) => ({top: parseInt(row.style.top),"
            " name: row.querySelector('.label').textContent,"
            " chips: [...row.querySelectorAll('.chip b')].map((one) => one.textContent)}))"
        )
        return sorted(found, key=lambda row: row["top"])

    def marks(self, frame=(0, 0, 1)) -> list[dict]:
        """The boxes that are drawn; in pixels of the photograph, if its left, top and scale on the screen are given."""
        x, y, scale = frame
        found = self.run(
            "return [...document.querySelectorAll('#boxes .mark')].map((one) => {"
            " const r = one.querySelector('.line').getBoundingClientRect();"
            " return {...one.dataset, box: [r.x, r.y, r.width, r.height]}; })"
        )
        for one in found:
            left, top, width, height = one["box"]
            one["box"] = [(left - x) / scale, (top - y) / scale, width / scale, height / scale]
        return found

    def panel(self) -> list[dict]:
        return self.run(
            "return [...document.querySelectorAll('#marks li.mark')].map((one) =>"
            " ({class: one.querySelector('.class').textContent, figure: one.querySelector('.figure').textContent}))"
        )

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last clearing."""
        return self.run("return performance.getEntriesByType('resource').map((one) => one.name)")
