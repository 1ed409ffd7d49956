"""A form on the screen: fields below each other, an error at the field that has it, what was typed kept."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Button, Checkbox, Input, Label, Select, Static

from sysctr import errors
from sysctr.tui.forms import Field, Form, Kind, Values, Wrong
from sysctr.tui.said import shown
from sysctr.tui.screens.above import Above

_LOOK_S = 0.1
# Sends what was filled in; what it raises is shown, and the form stays.
Send = Callable[[Values], Awaitable[object]]


class Flag(Checkbox):
    """A box whose cross is not there at all while it is off, and not only of another colour."""

    BUTTON_INNER = " "

    def watch_value(self) -> None:
        """Draw it anew."""
        self.BUTTON_INNER = "X" if self.value else " "
        super().watch_value()


class FormScreen(Above["object | None"]):
    """Asks for the fields of a form; returns what `send` made of them, None where it was given up."""

    BINDINGS = [
        Binding("escape", "cancel", "Cancel", id="form.cancel"),
        Binding("ctrl+s", "submit", "Done", id="form.submit", priority=True),
        Binding("down", "app.focus_next", show=False),
        Binding("up", "app.focus_previous", show=False),
    ]

    def __init__(
        self, form: Form, title: str, initial: "Mapping[str, str | bool]",
        choices: "Mapping[str, Sequence[str]]",
        send: Send,
    ) -> None:  # fmt: skip
        super().__init__()
        self.form = form
        self._title = title
        self._initial = initial
        self._choices = choices
        self._send = send
        self._sending = False

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide"):
            yield Static(shown(self._title), classes="dialog--title")
            with VerticalScroll(classes="dialog--body"):
                for place, field in enumerate(self.form.fields):
                    with Horizontal(classes="field"):
                        yield Label(
                            Text(field.label + (" *" if field.required else "")), classes="field--label"
                        )
                        yield self._widget(field, f"field-{place}")
            yield Static(Text(self.form.note), classes="dialog--note")
            yield Static("", classes="dialog--error", id="error")
            with Horizontal(classes="dialog--buttons"):
                yield Button("Cancel", id="cancel")
                yield Button(self.form.button, id="submit", variant="primary")

    def _widget(self, field: Field, name: str) -> "Input | Checkbox | Select":
        value = self._initial.get(field.key, field.value)
        if field.kind is Kind.FLAG:
            return Flag("", bool(value), id=name, compact=True)
        if field.kind is Kind.CHOICE:
            words = list(field.choices or self._choices.get(field.source, ()))
            if value and value not in words:
                words.insert(0, str(value))
            chosen = (
                str(value) if value else (words[0] if field.required and len(words) == 1 else Select.NULL)
            )
            return Select(
                [(Text(word), word) for word in words], prompt=field.hint or "choose", value=chosen, id=name,
                compact=True,
            )  # fmt: skip
        return Input(
            str(value), placeholder=field.hint, password=field.kind is Kind.SECRET, id=name, compact=True
        )

    def typed(self) -> "dict[str, str | bool]":
        """Return what stands in the fields."""
        found: dict[str, str | bool] = {}
        for place, field in enumerate(self.form.fields):
            widget = self.query_one(f"#field-{place}")
            if isinstance(widget, Select):
                found[field.key] = "" if widget.value is Select.NULL else str(widget.value)
            elif isinstance(widget, (Checkbox, Input)):
                found[field.key] = widget.value
        return found

    def on_mount(self) -> None:
        self.set_focus(self.query_one("#field-0"))

    def on_button_pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "submit":
            self.action_submit()
        else:
            self.action_cancel()

    def on_input_submitted(self) -> None:
        self.focus_next()

    def action_cancel(self) -> None:
        """Give it up."""
        self.dismiss(None)

    def action_submit(self) -> None:
        """Send what is filled in; what is wrong with it is said, and can be mended."""
        if self._sending:
            return
        try:
            values = self.form.read(self.typed())
        except Wrong as error:
            place = [field.key for field in self.form.fields].index(error.field)
            self._complain(f"{self.form.fields[place].label}: {error.reason}")
            self.query_one(f"#field-{place}").focus()
            return
        self._sending = True
        self.run_worker(self._submit(values), exclusive=True, exit_on_error=False)

    async def _submit(self, values: Values) -> None:
        button = self.query_one("#submit", Button)
        button.disabled = True
        try:
            result = await self._send(values)
        except errors.SysctrError as error:
            self._complain("\n".join(part for part in (error.message, error.hint) if part))
        except Exception as error:  # not a cancellation: then nothing is left to be drawn
            self._complain(f"a mistake in sysctr: {error!r}")
        else:
            # Something may be open above it, and no event tells of its end.
            while not self.is_active:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_S)
            self.dismiss(result)
            return
        self._sending, button.disabled = False, False

    def _complain(self, text: str) -> None:
        self.query_one("#error", Static).update(shown(text))
