# What a unit that calls NVML gets beyond hardening.nix.
{
  # NVML reads the NVIDIA devices; it writes to nvidiactl to open them.
  PrivateDevices = false;
  DevicePolicy = "closed";
  DeviceAllow = [
    "char-nvidia rw"
    "char-nvidia-frontend rw"
    "/dev/nvidiactl rw"
  ];
  # The device nodes belong to root in the host's user namespace.
  PrivateUsers = false;
  # NVML looks for the devices and the driver's settings in /proc.
  ProcSubset = "all";
}
