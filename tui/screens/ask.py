"""Questions: yes or no, and the name to type before something is gone for good."""

from collections.abc import Sequence
from dataclasses import dataclass

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Button, Input, Static

from sysctr.tui.said import shown
from sysctr.tui.screens.above import Above

_MOST_NAMED = 10


@dataclass(frozen=True)
class Question:
    """What is about to be done, to what, and what of that cannot be."""

    title: str
    names: Sequence[str]
    skipped: Sequence[tuple[str, str]] = ()
    # A line each, or several.
    warning: str = ""
    button: str = "Yes"
    # What has to be typed; empty where a key is enough.
    word: str = ""

    def lines(self) -> list[str]:
        """Return what is said: the first of the names, and what is left out and why."""
        said = [f"  {name}" for name in self.names[:_MOST_NAMED]]
        if len(self.names) > _MOST_NAMED:
            said.append(f"  … and {len(self.names) - _MOST_NAMED} more")
        if self.skipped:
            said += ["", f"Not {len(self.skipped)}:"]
            said += [f"  {name}: {reason}" for name, reason in self.skipped[:_MOST_NAMED]]
            if len(self.skipped) > _MOST_NAMED:
                said.append(f"  … and {len(self.skipped) - _MOST_NAMED} more")
        if self.warning:
            said += ["", *self.warning.split("\n")]
        return said


class AskScreen(Above[bool]):
    """Asks a question; escape is no."""

    BINDINGS = [
        Binding("escape,n", "answer(False)", "No", id="ask.no"),
        Binding("y", "answer(True)", "Yes", id="ask.yes"),
    ]

    def __init__(self, question: Question) -> None:
        super().__init__()
        self.question = question

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(shown(self.question.title), classes="dialog--title")
            with VerticalScroll(classes="dialog--body"):
                yield Static(shown("\n".join(self.question.lines())))
            if self.question.word:
                yield Static(shown(f"Type {self.question.word} to go on:"), classes="dialog--note")
                yield Input(id="word")
            with Horizontal(classes="dialog--buttons"):
                yield Button("No", id="no")
                yield Button(
                    self.question.button, id="yes", variant="error" if self.question.word else "primary"
                )

    def on_mount(self) -> None:
        if self.question.word:
            self.query_one("#yes", Button).disabled = True
            self.set_focus(self.query_one(Input))
        else:
            # Enter that was pressed too often decides nothing.
            self.set_focus(self.query_one("#no"))

    def on_input_changed(self, event: Input.Changed) -> None:
        self.query_one("#yes", Button).disabled = event.value.strip() != self.question.word

    def on_input_submitted(self) -> None:
        self.action_answer(True)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        self.action_answer(event.button.id == "yes")

    def action_answer(self, answer: bool) -> None:
        """End with an answer, unless the word that is needed was not typed."""
        if answer and self.question.word and self.query_one(Input).value.strip() != self.question.word:
            return
        self.dismiss(answer)
