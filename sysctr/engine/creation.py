"""Creating and destroying containers: one is there completely, or nothing of it is."""

import contextlib
import dataclasses
import logging
from contextlib import ExitStack

from sysctr.cgroup.base import check_enforceable
from sysctr.config import host as host_settings
from sysctr.config import schema, toml, values
from sysctr.engine import guest
from sysctr.engine.changes import with_macs
from sysctr.engine.disks import disk_limit
from sysctr.engine.host import Host, owner
from sysctr.engine.lifecycle import Lifecycle, limits_of
from sysctr.engine.pools import HOME
from sysctr.engine.record import Record, new_record
from sysctr.engine.tasks import Task
from sysctr.errors import ConfigError, NotFound, Refused, SysctrError, UsageError, WrongState

log = logging.getLogger(__name__)


class Creation:
    """Makes and unmakes containers."""

    def __init__(self, host: Host, lifecycle: Lifecycle) -> None:
        self._host = host
        self._lifecycle = lifecycle

    def check(self, spec: dict) -> dict:
        """Return the changes a creation request means, checked; raises before anything is made."""
        host = self._host
        try:
            values.parse_name(spec["name"])
        except ConfigError as error:
            raise UsageError(f"cannot create a container: {error.message}") from error
        changes: dict = dict(host_settings.creation_changes(host.settings))
        changes |= schema.plain_changes(spec.get("set") or {})
        template = spec.get("template") or changes.get("template")
        if not template:
            raise UsageError(
                f"cannot create {spec['name']}: no template is named", "`sysctr template list` shows them"
            )
        changes |= schema.plain_changes(
            {f"environment.{key}": value for key, value in (spec.get("environment") or {}).items()}
        )
        for index, net in enumerate(spec.get("nets") or [{"name": "eth0"}]):
            changes |= schema.plain_changes({f"net.{index}": net})
        for kind in ("mount", "device"):
            for index, line in enumerate(spec.get(f"{kind}s") or ()):
                changes |= schema.plain_changes({f"{kind}.{index}": line})
        self.check_pool(spec, spec["name"])
        changes |= {"name": spec["name"], "template": template}
        if spec.get("tags"):
            changes |= schema.plain_changes({"tags": spec["tags"]})
        if spec.get("onboot"):
            changes["onboot"] = True
        for key in spec.get("ssh_keys") or ():
            guest.check_ssh_key(key)
        return changes

    def check_pool(self, spec: dict, name: str) -> None:
        """Raise an error if the pool that a request asks for cannot be used."""
        self._host.pools.get(self._pool(spec), f"create {name}")

    def create(self, task: Task, spec: dict, changes: dict, number: int) -> dict:
        """Create the container whose number and name are reserved already, and start it where asked."""
        host = self._host
        with ExitStack() as undo:
            undo.callback(host.store.release, number)
            template = host.templates.get(changes["template"])
            idmap = host.store.allocate_ids(number)
            text = self._config_text(changes)
            record = new_record(number, text, idmap, template=template.name, pool=self._pool(spec))
            self._refuse_unenforceable(record)
            driver = host.driver(record)
            base = host.pools.base(template, host.templates.rootfs(template.name), record.pool)
            driver.create(
                record.volume, base, host.worker(record, task), size_bytes=record.config.limits.disk_bytes
            )
            undo.callback(driver.destroy, record.volume)
            record = with_limit(record, disk_limit(host, record))
            host.mounts.prepare(record, None, undo, task)
            undo.callback(host.network.release, number)
            host.network.ensure()
            # Now, so that a taken address is told before anything runs.
            host.network.enroll(number, record.config.name, record.config.nets)
            password = spec.get("password")
            hashed = guest.hash_password(password) if password else None
            work = guest.login_setup(spec.get("ssh_keys") or (), hashed)
            if work is not None:
                task.step("setting up logins")
                root = host.activate(record)
                undo.callback(driver.deactivate, record.volume)
                host.jobs_for(record).run_builtin(number, root, work, task)
                driver.deactivate(record.volume)
            task.check()
            host.store.create(record)
            undo.pop_all()
        host.bus.publish("container", id=number, change="created")
        if spec.get("start"):
            self._lifecycle.start_new(task, record)
        return {"id": number, "name": record.config.name}

    def destroy(self, task: Task, number: int, *, force: bool = False) -> None:
        """Remove a container with all it has; works for a damaged one and on a full disk too."""
        host = self._host
        record = host.store.load(number)
        self.refuse_protected(record, "destroy")
        host.guard("destroy", record)
        if host.live.running(number):
            if not force:
                raise WrongState(
                    f"cannot destroy {number}: it is running", "stop it first, or destroy it with --force"
                )
            self._lifecycle.stop(task, number, kill=True)
        if not force:
            self._refuse_unreachable(record)
        self.remove(number)

    def remove(self, number: int) -> None:
        """Take away all there is of a container that does not run."""
        host = self._host
        if host.live.get(number) is not None:
            host.live.wait_settled(number, 30)
        self._lifecycle.quietly(host.cgroups.destroy, number)
        self._lifecycle.quietly(host.network.detach, number)
        self.discard_volumes(number)
        self._lifecycle.quietly(host.network.release, number)
        # The ids are free again only now that no file of theirs can be reached.
        host.store.delete(number)
        host.live.forget(number)
        self._lifecycle.quietly(host.supervisor.forget, number)
        self._lifecycle.quietly(host.forget_console, number)
        host.bus.publish("container", id=number, change="destroyed")
        host.collect_soon()

    def _refuse_unreachable(self, record: Record) -> None:
        """Raise WrongState where the pool cannot be reached: the files would stay in it, without an owner."""
        with contextlib.suppress(NotFound):
            problem = self._host.pools.problem(record.pool)
            if problem is not None:
                raise WrongState(
                    f"cannot destroy {record.id}: {problem.reason}",
                    "--force forgets the container and leaves its files in the pool",
                )

    def discard_volumes(self, number: int) -> None:
        """Destroy every volume that belongs to a container, whatever is known of it."""
        for name in self._host.pools.names():
            # A pool that cannot be reached keeps what it has; its own sweep finds it without an owner.
            with contextlib.suppress(SysctrError):
                driver = self._host.pools.get(name)
                for volume in driver.list():
                    if owner(volume) == number:
                        driver.deactivate(volume)
                        driver.destroy(volume)

    def refuse_protected(self, record: Record, verb: str) -> None:
        """Raise Refused for a container that its administrator protects."""
        if record.config is not None and record.config.protected:
            raise Refused(
                f"cannot {verb} {record.id}: it is protected", f"`sysctr protect {record.id} --off` first"
            )

    def _pool(self, spec: dict) -> str:
        return spec.get("pool") or self._host.settings.defaults.pool or HOME

    def _config_text(self, changes: dict) -> str:
        text = with_macs(toml.edit(f"schema = {schema.SCHEMA}\n", changes))
        return toml.new_text(schema.parse_config(toml.read_container(text)))

    def _refuse_unenforceable(self, record: Record) -> None:
        host = self._host
        driver = host.driver(record)
        if record.config.limits.disk_bytes is not None and not driver.traits.enforces_size:
            raise Refused(
                f"cannot limit the disk of {record.config.name}: the driver {driver.kind} of pool "
                f"{record.pool} cannot enforce a size",
                "leave --disk out, or choose another --pool",
            )
        check_enforceable(record.id, limits_of(record), host.cgroups.available)


def with_limit(record: Record, size_bytes: int | None) -> Record:
    """Let the configuration say which limit a disk has that cannot be without one."""
    if size_bytes is None or record.config is None or record.config.limits.disk_bytes is not None:
        return record
    text = toml.edit(record.config_text, {"limits.disk": values.format_size(size_bytes)})
    config = schema.parse_config(toml.read_container(text))
    return dataclasses.replace(record, config=config, config_text=text)
