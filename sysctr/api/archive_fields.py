"""What requests for backups and restores say."""

from sysctr.api.fields import Anything, Array, Boolean, Field, Nullable, Number, Object, Table, Text
from sysctr.config.backup import CODECS, MODES
from sysctr.config.pct_notes import PERMISSIONS

PATH = Text(4096, raw=True)
_NAME = Nullable(Text(63))
_HOW = (
    Field("mode", Nullable(Text(choices=MODES)), "how the state is taken; without it as the host says"),
    Field("compress", Nullable(Text(choices=CODECS)), "the codec; without it as the host says"),
    Field("exclude", Array(Text(4096), 1024), "patterns of names that are left out, as vzdump has them"),
    Field("bwlimit_bytes", Nullable(Number(0, 2**50)), "most bytes read a second, 0: no limit"),
)
BACKUP = (
    *_HOW,
    Field("directory", Nullable(PATH), "absolute path of a directory; without it the host's own"),
    Field("notes", Nullable(Text(8192, raw=True)), "a template of notes: {{guestname}} {{vmid}} {{node}}"),
    Field("protected", Boolean(), "protect the archive from being removed"),
)
RESTORE = (
    Field("id", Nullable(Number(100, 9999)), "number; without it the archive's, or the first free one"),
    Field("name", _NAME, "name; without it the archive's"),
    Field("pool", _NAME, "pool that it is kept in"),
    Field("force", Boolean(), "replace the container of that number, when all is unpacked"),
    Field("unique", Boolean(), "give it an identity of its own in any case"),
    Field("start", Boolean(), "start it at once"),
    Field("allow", Array(Text(choices=PERMISSIONS), 16), "what of the host the archive may ask for"),
    Field("set", Table(Anything()), "settings by key that differ"),
)
STREAMED_BACKUP = Object(_HOW)
STREAMED_RESTORE = Object(RESTORE)
REQUEST = Text(7000, raw=True)
