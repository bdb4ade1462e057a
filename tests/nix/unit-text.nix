# Writes the unit file of a `systemd.services.<name>` in NixOS' own form, for machines without NixOS: name -> service ->
# { text, files }. `files` are the scripts that the unit runs, by path. With the real modules, `systemd.units.<name>.text` is the same.
{ lib }:
name: service:
let
  scriptPath = "/nix/store/00000000000000000000000000000000-unit-script-${name}-start/bin/${name}-start";
  value =
    v:
    if lib.isBool v then
      lib.boolToString v
    else if lib.isList v then
      lib.concatMapStringsSep " " toString v
    else
      toString v;
  # A list is a repeated key, as in NixOS; its first empty string is systemd's way to reset one.
  lines =
    attributes:
    lib.concatStrings (
      lib.concatLists (
        lib.mapAttrsToList (
          key: v: map (one: "${key}=${value one}\n") (if lib.isList v then v else [ v ])
        ) attributes
      )
    );
  notEmpty = lib.filterAttrs (_: v: v != "" && v != [ ] && v != null);
  unit =
    notEmpty {
      Description = service.description;
      Documentation = lib.concatStringsSep " " service.documentation;
      Wants = lib.concatStringsSep " " service.wants;
      Requires = lib.concatStringsSep " " service.requires;
      After = lib.concatStringsSep " " service.after;
      StartLimitIntervalSec = service.startLimitIntervalSec;
      StartLimitBurst = service.startLimitBurst;
    }
    // service.unitConfig;
  environment = lib.concatStrings (
    lib.mapAttrsToList (
      key: v: "Environment=${builtins.toJSON "${key}=${toString v}"}\n"
    ) service.environment
  );
  run = service.serviceConfig // lib.optionalAttrs (service.script != "") { ExecStart = scriptPath; };
in
{
  text = "[Unit]\n${lines unit}\n[Service]\n${environment}${lines run}";
  files = lib.optionalAttrs (service.script != "") {
    ${scriptPath} = "#!/bin/sh -e\n${service.script}";
  };
}
