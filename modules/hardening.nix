# Sandbox that every pascaline unit starts from. A unit that needs more overrides a line and says why.
#
# What `systemd-analyze security` still counts in all of them:
# - RootDirectory, RootImage: the programs lie in the Nix store of the host.
# - PrivateMounts: systemd implies it if it mounts anything for a unit, as it does for ProtectSystem.
# - IPAddressDeny: a listener's address and the firewall decide who may reach it. A download goes to any host.
# - PrivateNetwork, in units that listen or download; the others set it.
# - DeviceAllow: ProtectClock itself lets a unit read the clock's device.
{
  AmbientCapabilities = "";
  CapabilityBoundingSet = "";
  LockPersonality = true;
  MemoryDenyWriteExecute = true;
  NoNewPrivileges = true;
  PrivateDevices = true;
  PrivateTmp = true;
  PrivateUsers = true;
  ProcSubset = "pid";
  ProtectClock = true;
  ProtectControlGroups = true;
  ProtectHome = true;
  ProtectHostname = true;
  ProtectKernelLogs = true;
  ProtectKernelModules = true;
  ProtectKernelTunables = true;
  ProtectProc = "invisible";
  ProtectSystem = "strict";
  RemoveIPC = true;
  # For listeners and downloads, and for the sockets of the service manager, the agent and the driver's daemon.
  RestrictAddressFamilies = [
    "AF_INET"
    "AF_INET6"
    "AF_UNIX"
  ];
  RestrictNamespaces = true;
  RestrictRealtime = true;
  RestrictSUIDSGID = true;
  SystemCallArchitectures = "native";
  # A library that tries a forbidden call gets an error and goes on; the default would kill the process.
  SystemCallErrorNumber = "EPERM";
  # @resources, a part of @system-service, stays: the supervisor raises its limit of open files, and binds the engine to the CPUs of its GPU.
  SystemCallFilter = [
    "@system-service"
    "~@privileged"
  ];
  UMask = "0077";
}
