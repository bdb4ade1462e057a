# The NVIDIA driver for Pascal: the R580 branch with its closed kernel module, headless.
{
  config,
  lib,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.hardware.pascaline.driver;
  driverPackage = config.hardware.nvidia.package;
  # The bounds with which the doctor compares a running driver. torch is built for CUDA 12 (python/wheels.json).
  branches = lib.importTOML ../python/pascaline/src/pascaline/cards/driver.toml;
  leastBranch = toString branches.least_branch."12";
  lastBranch = toString branches.last_pascal_branch;
  version = driverPackage.version or "0";
  useLast = "set hardware.pascaline.driver.branch = \"legacy_${lastBranch}\" and do not set hardware.nvidia.package";
  hardening = import ./hardening.nix;
  nvmlAccess = import ./nvml-access.nix;
  nvidiaSmi = lib.getExe' (lib.getBin driverPackage) "nvidia-smi";
  limits =
    lib.optional (cfg.powerLimitWatts != null) "--power-limit=${toString cfg.powerLimitWatts}"
    ++
      lib.optional (cfg.applicationClocks != null)
        "--applications-clocks=${toString cfg.applicationClocks.memory},${toString cfg.applicationClocks.graphics}";
in
{
  options.hardware.pascaline.driver = {
    enable = lib.mkEnableOption "the last NVIDIA driver for Pascal, R580 with its closed kernel module, without a display";

    computeCapability = mkOption {
      type = types.strMatching "[0-9]+\\.[0-9]";
      default = "6.1";
      example = "6.0";
      description = ''
        Compute capability of this host's GPUs: 6.0 for Tesla P100; 6.1 for Tesla P4, P40 and GTX 10xx.
        Any other value is refused: the packages contain kernels for these two only.
      '';
    };

    branch = mkOption {
      type = types.str;
      default = "legacy_580";
      example = "legacy_535";
      description = ''
        Attribute of `boot.kernelPackages.nvidiaPackages` that is the driver. R580 is the last branch that supports Pascal;
        the NixOS default is newer and ignores the card without an error. R525 is the oldest that runs the engine's torch.
        Both bounds are checked at evaluation.
      '';
    };

    persistence = mkOption {
      type = types.bool;
      default = true;
      example = false;
      description = "Whether nvidia-persistenced keeps the GPU initialised while nothing uses it; without it the first call takes seconds.";
    };

    powerLimitWatts = mkOption {
      type = types.nullOr types.ints.positive;
      default = null;
      example = 60;
      description = "Power limit of every GPU in watts, set at boot. `null` keeps the card's default (75 W on a Tesla P4).";
    };

    applicationClocks = mkOption {
      type = types.nullOr (
        types.submodule {
          options = {
            memory = mkOption {
              type = types.ints.positive;
              example = 3003;
              description = "Memory clock in MHz. `nvidia-smi -q -d SUPPORTED_CLOCKS` lists the allowed values.";
            };
            graphics = mkOption {
              type = types.ints.positive;
              example = 1531;
              description = "Graphics clock in MHz. `nvidia-smi -q -d SUPPORTED_CLOCKS` lists the allowed values for each memory clock.";
            };
          };
        }
      );
      default = null;
      example = {
        memory = 3003;
        graphics = 1531;
      };
      description = "Application clocks of every GPU, set at boot. `null` keeps the card's default (1113 MHz on a Tesla P4, below its maximum).";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = lib.versionAtLeast cfg.computeCapability "6.0";
        message = "hardware.pascaline.driver.computeCapability: ${cfg.computeCapability} is older than Pascal, must be 6.0 (Tesla P100) or 6.1 (Tesla P4, P40, GTX 10xx); cards below 6.0 are not supported";
      }
      {
        assertion = lib.versionOlder cfg.computeCapability "6.2";
        message = "hardware.pascaline.driver.computeCapability: ${cfg.computeCapability} is newer than Pascal's cards for servers and desktops, must be 6.0 or 6.1; newer cards are served by upstream SGLang with the default driver";
      }
      {
        assertion = lib.versionOlder version (toString (branches.last_pascal_branch + 1));
        message = "hardware.pascaline.driver.branch: driver ${version} of branch '${cfg.branch}' ignores Pascal, must be R${lastBranch} or older; ${useLast}";
      }
      {
        assertion = lib.versionAtLeast version leastBranch;
        message = "hardware.pascaline.driver.branch: driver ${version} of branch '${cfg.branch}' is too old for torch's CUDA 12, must be R${leastBranch} or newer; ${useLast}";
      }
      {
        assertion = lib.elem "nvidia" config.services.xserver.videoDrivers;
        message = "services.xserver.videoDrivers: nvidia is not among ${lib.concatStringsSep ", " config.services.xserver.videoDrivers}, must be there for its kernel module to be installed, with or without an X server; add it";
      }
      {
        assertion = config.hardware.nvidia.open != true;
        message = "hardware.nvidia.open: the open kernel module needs a GPU with GSP firmware (Turing or newer), must be false for Pascal; remove your setting";
      }
    ];

    # This option installs the kernel module, also without an X server.
    services.xserver.videoDrivers = lib.mkDefault [ "nvidia" ];
    hardware.graphics.enable = true;
    hardware.nvidia = {
      branch = lib.mkDefault cfg.branch;
      open = lib.mkDefault false;
      nvidiaSettings = lib.mkDefault false;
      nvidiaPersistenced = cfg.persistence;
      # A server has no display and decodes no video.
      videoAcceleration = lib.mkDefault false;
    };

    # CUDA's device needs nvidia_uvm, which hardened units may not load. NixOS' module has it follow the driver (a softdep), and
    # udev loads the driver where a card is. Listed in boot.kernelModules, a dead card would fail systemd-modules-load.

    systemd.services.pascaline-gpu-limits = lib.mkIf (limits != [ ]) {
      description = "Power limit and application clocks of the GPUs";
      wantedBy = [ "multi-user.target" ];
      wants = lib.optional cfg.persistence "nvidia-persistenced.service";
      after = lib.optional cfg.persistence "nvidia-persistenced.service";
      serviceConfig =
        hardening
        // nvmlAccess
        // {
          Type = "oneshot";
          RemainAfterExit = true;
          # nvidia-smi takes one of these settings per call.
          ExecStart = map (limit: "${nvidiaSmi} ${limit}") limits;
          # The driver accepts limits only from a process with this capability in the host's user namespace.
          CapabilityBoundingSet = [ "CAP_SYS_ADMIN" ];
          PrivateNetwork = true;
          # The socket of nvidia-persistenced.
          RestrictAddressFamilies = [ "AF_UNIX" ];
        };
    };
  };
}
