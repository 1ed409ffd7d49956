"""The templates of this host, each whole or not there at all.

    POOL/layers/NAME/rootfs/         the tree, ids as seen inside
    POOL/layers/NAME/template.json   what it is
    POOL/layers/.building-NAME-…     one being made; swept after a crash
"""

import contextlib
import difflib
import errno
import json
import logging
import os
import time
from collections.abc import Callable, Sequence

from sysctr.errors import NotFound, SysctrError, WrongState
from sysctr.paths import Layout
from sysctr.storage import tree
from sysctr.template.base import Made, Template, check_name, template_from_dict
from sysctr.template.rootfs_check import check_rootfs

log = logging.getLogger(__name__)

_RECORD_MAX_BYTES = 1024 * 1024


class Registry:
    """Lists, makes and removes templates."""

    def __init__(self, layout: Layout) -> None:
        self.directory = f"{layout.pool}/layers"
        self.trash = tree.Trash(f"{layout.pool}/.trash")

    def prepare(self) -> None:
        """Make the directories; nothing else is touched."""
        for directory in (os.path.dirname(self.directory), self.directory, self.trash.directory):
            tree.ensure_directory(directory)

    def sweep(self) -> None:
        """Throw away what a crash left of a template being made; called once, by the only daemon."""
        self.trash.sweep(self.directory)

    def list(self) -> list[Template]:
        """Return all templates by name; a damaged one is logged and left out."""
        templates = []
        for name in self._names():
            try:
                templates.append(self._read(name))
            except SysctrError as error:
                log.warning("%s", error)
        return templates

    def get(self, name: str) -> Template:
        """Return the template called `name`.

        Raises NotFound with the nearest name there is, SysctrError when its record is damaged.
        """
        check_name(name)
        names = self._names()
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            if near:
                hint = f"did you mean {near[0]}?"
            elif names:
                hint = f"there is {', '.join(names)}"
            else:
                hint = "`sysctr template build debian-12` makes one"
            raise NotFound(f"cannot find template {name}: there is none of this name", hint=hint)
        return self._read(name)

    def rootfs(self, name: str) -> str:
        """Return the path of a template's tree; it is shared by containers and never changed."""
        return f"{self.directory}/{self.get(name).layer}/rootfs"

    def add(
        self,
        name: str,
        build: Callable[[str], Made],
        *,
        log_line: Callable[[str], None] = lambda line: None,
    ) -> Template:
        """Make the template `name` and return it.

        `build` fills `rootfs/` in the hidden directory it is given. If it fails, or the tree cannot be a
        root here, nothing is left. The name appears when everything is on the disk, not before.
        """
        check_name(name)
        final = f"{self.directory}/{name}"
        doing = f"make template {name}"
        self._refuse_existing(name)
        building = f"{self.directory}/{tree.hidden_name('building', name)}"
        try:
            with contextlib.ExitStack() as undo:
                os.mkdir(building, 0o700)
                undo.callback(self._discard, building)
                os.mkdir(f"{building}/rootfs", 0o755)
                os.chmod(f"{building}/rootfs", 0o755)
                made = build(building)
                template = self._describe(name, building, made)
                record = json.dumps(template.as_dict(), indent=2, ensure_ascii=False)
                tree.write_file(f"{building}/template.json", record + "\n")
                log_line("writing everything to the disk")
                tree.sync_file_system(building)
                # Fails where another task was faster: a directory that is not empty is never replaced.
                os.rename(building, final)
                undo.pop_all()
                tree.sync_directory(self.directory)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise WrongState(f"cannot {doing}: it exists already") from error
            raise tree.explain(error, doing, self.directory) from error
        return template

    def remove(self, name: str, used_by: Callable[[], Sequence[str]]) -> None:
        """Take a template away; `used_by` says which containers stand on it.

        Raises NotFound, or WrongState that names the containers.
        """
        if name not in self._names():
            self.get(name)  # says what there is
        self._refuse_used(name, used_by())
        final = f"{self.directory}/{name}"
        hidden = f"{self.directory}/{tree.hidden_name('removed', name)}"
        try:
            os.rename(final, hidden)
            # A container may have been created in between: it looks for the layer after it is made.
            users = used_by()
            if users:
                os.rename(hidden, final)
                self._refuse_used(name, users)
            self.trash.throw(hidden)
        except OSError as error:
            raise tree.explain(error, f"remove template {name}", self.directory) from error

    def _describe(self, name: str, building: str, made: Made) -> Template:
        found = check_rootfs(f"{building}/rootfs", made.init, made.stop_signal)
        return Template(
            name=name,
            layer=name,
            version=made.version,
            os_id=found.os_id,
            os_version=found.os_version,
            os_name=found.os_name,
            arch=found.arch,
            created=int(time.time()),
            source=made.source,
            size_bytes=tree.size_bytes(f"{building}/rootfs"),
            init=found.init,
            init_kind=found.init_kind,
            stop_signal=found.stop_signal,
            description=made.description,
            labels=made.labels,
            packages=made.packages,
        )

    def _discard(self, building: str) -> None:
        # What failed may have filled the disk: it is deleted now, not when the trash is emptied.
        try:
            tree.delete(building)
        except SysctrError as error:
            log.warning("cannot delete %s: %s", building, error)
            self.trash.throw(building)

    def _refuse_existing(self, name: str) -> None:
        if os.path.lexists(f"{self.directory}/{name}"):
            raise WrongState(
                f"cannot make template {name}: it exists already",
                hint=f"choose another name, or `sysctr template remove {name}` first",
            )

    def _refuse_used(self, name: str, users: Sequence[str]) -> None:
        if users:
            shown = ", ".join(list(users)[:5]) + (f" and {len(users) - 5} more" if len(users) > 5 else "")
            raise WrongState(
                f"cannot remove template {name}: used by {shown}", hint="destroy these containers first"
            )

    def _names(self) -> tuple[str, ...]:
        try:
            return tuple(sorted(name for name in os.listdir(self.directory) if not name.startswith(".")))
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise tree.explain(error, "list templates", self.directory) from error

    def _read(self, name: str) -> Template:
        path = f"{self.directory}/{name}/template.json"
        try:
            with open(path, "rb") as file:
                template = template_from_dict(json.loads(file.read(_RECORD_MAX_BYTES)))
        except (ValueError, RecursionError, OSError) as error:
            raise SysctrError(
                f"cannot use template {name}: {path} is damaged ({error})",
                hint=f"`sysctr template remove {name}`, then build or import it again",
            ) from error
        return template

