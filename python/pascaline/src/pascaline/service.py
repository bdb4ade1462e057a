"""The systemd unit of an instance on hosts without NixOS, with the sandbox and limits of modules/inference.nix."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from pascaline.errors import ConfigurationError
from pascaline.planning.unit_limits import NO_LIMITS, UnitLimits

UNIT_FOLDER = Path("/etc/systemd/system")
HIDDEN = (Path("/home"), Path("/root"), Path("/run/user"), Path("/tmp"), Path("/var/tmp"))  # noqa: S108 # named, not used
"""Folders that a unit with ProtectHome and PrivateTmp does not see."""

_UNIT = """\
# Written by `pascaline service`; changes belong into {name}.service.d/*.conf (systemctl edit {name}).
[Unit]
Description=Language model {instance} (pascaline)
Documentation=man:systemd.service(5)
After=network-online.target nvidia-persistenced.service
Wants=network-online.target
StartLimitBurst=10
StartLimitIntervalSec=3600

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
Restart=on-failure
RestartSec=5
RestartSteps=6
RestartMaxDelaySec=300
RestartPreventExitStatus=2 3 7 8
WatchdogSec=60
TimeoutStartSec=120
TimeoutStopSec={stop_seconds}
KillMode=mixed
OOMPolicy=continue

DynamicUser=true
{credential}Environment=HOME=/var/lib/{name}
Environment=TMPDIR=/run/{name}
Environment=XDG_CACHE_HOME=/var/cache/{name}
Environment=CUDA_CACHE_PATH=/var/cache/{name}/cuda
Environment=CUDA_DEVICE_ORDER=PCI_BUS_ID
Environment=CUDA_VISIBLE_DEVICES={gpus}
Environment=TORCHINDUCTOR_CACHE_DIR=/var/cache/{name}/inductor
CacheDirectory={name}
CacheDirectoryMode=0750
StateDirectory={name}
StateDirectoryMode=0750
RuntimeDirectory={name}
RuntimeDirectoryMode=0700
LimitMEMLOCK=infinity
LimitNOFILE=65536
{limits}
{devices}AmbientCapabilities=
CapabilityBoundingSet=
LockPersonality=true
MemoryDenyWriteExecute=false
NoNewPrivileges=true
PrivateTmp=true
ProcSubset=all
ProtectClock=true
ProtectControlGroups=true
ProtectHome=true
ProtectHostname=true
ProtectKernelLogs=true
ProtectKernelModules=true
ProtectKernelTunables=true
ProtectProc=invisible
ProtectSystem=strict
RemoveIPC=true
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=true
RestrictRealtime=true
RestrictSUIDSGID=true
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
UMask=0077

[Install]
WantedBy=multi-user.target
"""
_GPU_DEVICES = """\
# A GPU: NVIDIA's devices and no other.
PrivateDevices=false
PrivateUsers=false
DevicePolicy=closed
DeviceAllow=char-nvidia rw
DeviceAllow=char-nvidia-frontend rw
DeviceAllow=/dev/nvidiactl rw
DeviceAllow=/dev/nvidia-uvm rw
DeviceAllow=/dev/nvidia-uvm-tools rw
"""
_NO_DEVICES = """\
PrivateDevices=true
PrivateUsers=true
"""


def _limit_lines(limits: UnitLimits) -> str:
    lines = []
    if limits.memory_max_bytes is not None:
        lines.append(f"MemoryMax={limits.memory_max_bytes}")
    if limits.numa_nodes:
        mask = ",".join(map(str, limits.numa_nodes))
        lines += ["NUMAPolicy=bind", f"NUMAMask={mask}", "CPUAffinity=numa"]
    return "".join(f"{line}\n" for line in lines)


@dataclass(frozen=True)
class Unit:
    """The values that make up the unit of an instance."""

    instance: str
    executable: Path
    """The program `pascaline`."""
    config: Path
    """The TOML file with the settings."""
    model: Path | None
    """File or folder of the model; None for the built-in one."""
    gpus: str
    """CUDA_VISIBLE_DEVICES: indices in bus order or UUIDs, separated by commas; empty for the CPU."""
    api_key_file: Path | None = None
    """File with the API key. It may be readable by root alone: systemd passes its content to the unit."""
    served_model_name: str | None = None
    """Name of the model in the API according to the settings file; None: the instance's name."""
    drain_seconds: float = 60.0
    """The instance's drain_timeout."""
    limits: UnitLimits = NO_LIMITS
    """Memory limit and NUMA node that follow from the plan."""

    @property
    def name(self) -> str:
        """Name of the unit, without `.service`."""
        return f"pascaline-{self.instance}"

    @property
    def path(self) -> Path:
        """The unit file."""
        return UNIT_FOLDER / f"{self.name}.service"

    def text(self) -> str:
        """Return the unit file's content. Raises ConfigurationError if the unit could not see a file that it needs."""
        self._check()
        return _UNIT.format(
            name=self.name,
            instance=self.instance,
            command=" ".join(map(_quoted, self._command())),
            stop_seconds=round(self.drain_seconds) + 30,
            gpus=self.gpus,
            devices=_GPU_DEVICES if self.gpus else _NO_DEVICES,
            limits=_limit_lines(self.limits),
            credential=f"LoadCredential=api-key:{self.api_key_file}\n" if self.api_key_file else "",
        )

    def _command(self) -> list[str]:
        command = [str(self.executable), "serve", "--config", str(self.config)]
        if self.served_model_name is None:
            command += ["--served-model-name", self.instance]
        key = ["--api-key-file", f"/run/credentials/{self.name}.service/api-key"]
        return command + (key if self.api_key_file else [])

    def _check(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.instance):
            raise ConfigurationError(
                f"instance name {self.instance!r} must start with a letter or a digit, and hold only those and _ . -"
            )
        for what, path in (("the program", self.executable), ("the settings file", self.config), ("model", self.model)):
            if path is not None:
                _check_visible(what, path)


def _check_visible(what: str, path: Path) -> None:
    if not path.is_absolute():
        raise ConfigurationError(f"{what} must be named by an absolute path, got {path}")
    hidden = next((folder for folder in HIDDEN if path.is_relative_to(folder)), None)
    if hidden is not None:
        raise ConfigurationError(
            f"{what} {path} is under {hidden}, which the unit does not see; "
            "install into /opt/pascaline, keep settings in /etc/pascaline and models in /var/lib or /data"
        )


def _quoted(argument: str) -> str:
    """Return an argument quoted for ExecStart. systemd expands `%` and `$` even inside quotes."""
    plain = re.fullmatch(r"[A-Za-z0-9,._+:@%/=-]+", argument)
    return (argument if plain else json.dumps(argument)).replace("%", "%%").replace("$", "$$")
