# The host's static address, for a network without DHCP such as CloudLab's experiment network.
{
  config,
  lib,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.hardware.pascaline.network;
  selectors = lib.filterAttrs (_: value: value != null) { inherit (cfg) name mac driver; };
  # Only udev knows which interface has a MAC address or a driver, so udev gives that interface a name.
  renamed = cfg.name == null;
  interface = if renamed then "fleet0" else cfg.name;
  remedy = "set one of hardware.pascaline.network.name, mac, driver; on the host, \"ip -brief link\" lists names and MAC addresses, and \"ethtool --driver NAME\" a driver";
in
{
  options.hardware.pascaline.network = {
    address = mkOption {
      type = types.nullOr (types.strMatching "[0-9]+(\\.[0-9]+){3}");
      default = null;
      example = "10.10.1.1";
      description = ''
        IPv4 address at which the other hosts of a fleet reach this one; a fleet sets it from the inventory. `null`: the host gets
        its addresses by DHCP or by {option}`networking.interfaces`. Otherwise exactly one of
        {option}`hardware.pascaline.network.name`, {option}`hardware.pascaline.network.mac` and
        {option}`hardware.pascaline.network.driver` selects the interface.
      '';
    };

    prefixLength = mkOption {
      type = types.ints.between 1 32;
      default = 24;
      example = 16;
      description = "Prefix length: 24 is the netmask 255.255.255.0, as on CloudLab.";
    };

    name = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "enp94s0f0";
      description = "Interface that gets the address, by its name.";
    };

    mac = mkOption {
      type = types.nullOr (types.strMatching "[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}");
      default = null;
      example = "3c:fd:fe:00:00:01";
      description = "Interface that gets the address, by its MAC address; it is renamed to `fleet0`.";
    };

    driver = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "ixgbe";
      description = "Interface that gets the address, by its kernel driver; it is renamed to `fleet0`. Only one interface of the host may have this driver; a card with two ports has two interfaces.";
    };
  };

  config = lib.mkIf (cfg.address != null) {
    assertions = [
      {
        assertion = lib.length (lib.attrNames selectors) == 1;
        message = "hardware.pascaline.network.address: ${cfg.address} is for ${
          if selectors == { } then "no interface" else lib.concatStringsSep " and " (lib.attrNames selectors)
        }, must be for one; ${remedy}";
      }
    ];

    systemd.network.links = lib.mkIf renamed {
      "10-pascaline" = {
        matchConfig =
          lib.optionalAttrs (cfg.mac != null) { PermanentMACAddress = lib.toLower cfg.mac; }
          // lib.optionalAttrs (cfg.driver != null) { Driver = cfg.driver; };
        linkConfig.Name = interface;
      };
    };
    networking.interfaces.${interface}.ipv4.addresses = [
      { inherit (cfg) address prefixLength; }
    ];
  };
}
