# CloudLab nodes: boot from partition 1's boot record, serial console, the control network by DHCP, data on a partition of its own.
{
  config,
  lib,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.hardware.pascaline.cloudlab;
in
{
  options.hardware.pascaline.cloudlab = {
    enable = lib.mkEnableOption "what a CloudLab node needs to boot and to be reached: GRUB in partition 1, a serial console, DHCP, SSH";

    rootPartition = mkOption {
      type = types.strMatching "/dev/.*[^0-9][0-9]+";
      default = "/dev/sda1";
      example = "/dev/nvme0n1p1";
      description = ''
        Partition that holds the root file system and GRUB. CloudLab's network loader starts the boot record of partition 1,
        not of the disk; re-partitioning the whole disk breaks that chain. The host's own configuration of root file system and
        boot loader takes precedence.
      '';
    };

    controlInterface = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "eno1";
      description = "Interface of the control network. If it is set, only this interface uses DHCP. `null`: every interface with a cable and without a static address does.";
    };

    dataDevice = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "/dev/disk/by-label/data";
      description = "File system (ext4) for models, mounted at {option}`hardware.pascaline.cloudlab.dataMount`. `null`: models stay on the root partition.";
    };

    dataMount = mkOption {
      type = types.path;
      default = "/data";
      example = "/srv";
      description = "Mount point of {option}`hardware.pascaline.cloudlab.dataDevice`; the model store moves there.";
    };

    nixDevice = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "/dev/disk/by-label/nix";
      description = "File system (ext4) that is mounted at /nix, for a root partition that is too small for a CUDA system. `null`: /nix is on the root partition.";
    };
  };

  imports = [ ./common.nix ];

  config = lib.mkIf cfg.enable {
    # The initrd has every disk controller's driver: a node's hardware is known only once it is allocated.
    hardware.enableAllHardware = true;

    # GRUB is NixOS' own default. A host whose configuration names another boot loader or root file system keeps it.
    boot = {
      loader.grub = {
        device = lib.mkDefault cfg.rootPartition;
        # GRUB advises against a partition's boot record, but the network loader reads no other.
        forceInstall = lib.mkDefault true;
        extraConfig = ''
          serial --unit=0 --speed=115200
          terminal_input serial console
          terminal_output serial console
        '';
      };
      kernelParams = [
        "console=tty0"
        "console=ttyS0,115200n8"
      ];
    };

    fileSystems = {
      "/" = {
        device = lib.mkDefault cfg.rootPartition;
        fsType = lib.mkDefault "ext4";
      };
    }
    // lib.optionalAttrs (cfg.nixDevice != null) {
      "/nix" = {
        device = lib.mkDefault cfg.nixDevice;
        fsType = lib.mkDefault "ext4";
        neededForBoot = true;
        options = [ "noatime" ];
      };
    }
    // lib.optionalAttrs (cfg.dataDevice != null) {
      ${cfg.dataMount} = {
        device = lib.mkDefault cfg.dataDevice;
        fsType = lib.mkDefault "ext4";
        # A node without its data disk must still boot, so that it can be repaired.
        options = [
          "noatime"
          "nofail"
        ];
      };
    };
    services.pascaline.stateDir = lib.mkIf (cfg.dataDevice != null) (
      lib.mkDefault "${cfg.dataMount}/pascaline"
    );

    # Overrides what nixos-generate-config sets by mkDefault.
    networking.useDHCP = lib.mkIf (cfg.controlInterface != null) (lib.mkOverride 900 false);
    networking.interfaces = lib.mkIf (cfg.controlInterface != null) {
      ${cfg.controlInterface}.useDHCP = true;
    };
    services.openssh.enable = true;
  };
}
