"""The keys that `sysctr set` takes, for its help and for completion; a test holds them to the schema."""

# (how it is written, when a running container takes it, what it is)
KEYS = (
    ("name=NAME", "live", "unique name, and the host name inside"),
    ("description=TEXT", "live", "one line for people"),
    ("tags=TAG,...", "live", "words to select containers by"),
    ("onboot=BOOL", "live", "start when the host starts"),
    ("protected=BOOL", "live", "refuse to destroy it"),
    ("init=PATH", "restart", "program to run as init; empty: /sbin/init"),
    ("stop_signal=SIGNAL", "live", "signal that shuts init down; empty: the one it expects"),
    ("limits.cores=CORES", "live", "how many processors, or which ones"),
    ("limits.cpu=NUMBER", "live", "processor time, in processors"),
    ("limits.cpu_weight=NUMBER", "live", "share of a busy processor; others have 100"),
    ("limits.memory=SIZE", "live", "most memory"),
    ("limits.swap=SIZE", "live", "most swap, beside the memory"),
    ("limits.pids=NUMBER", "live", "most processes and threads"),
    ("limits.disk=SIZE", "live", "most disk space of the rootfs"),
    ("environment.NAME=TEXT", "restart", "variable of init's environment"),
    ("net.N.name=NAME", "restart", "name of the card inside"),
    ("net.N.bridge=NAME", "restart", "bridge of the host; empty: the one of sysctr"),
    ("net.N.mac=MAC", "restart", "MAC address; empty: chosen at creation"),
    ("net.N.ip=ADDRESS", "restart", "managed, manual, or ADDRESS/PREFIX"),
    ("net.N.gateway=IP", "restart", "default route of a card whose ip is an address"),
    ("net.N.mtu=NUMBER", "restart", "largest packet in bytes"),
    ("dns.nameservers=IP,...", "restart", "name servers; empty: the bridge's"),
    ("dns.search=DOMAIN,...", "restart", "domains to look short names up in"),
)
