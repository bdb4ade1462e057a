# The model store: files by URL or path, verified against a sha256 that the configuration pins, before an instance may start.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.pascaline;
  inherit (cfg) models;
  exec = import ./exec.nix { inherit lib; };
  hardening = import ./hardening.nix;
  storeUnit = "pascaline-store.service";
  inStore = {
    requires = [ storeUnit ];
    after = [ storeUnit ];
  };
  # A download link may end in a query, which is no part of the file's name.
  digest = types.strMatching "[0-9a-fA-F]{64}";
  digestsOf = model: lib.toList model.sha256;
  # The end of the first part's name, as llama-gguf-split writes it. The names of the other parts follow from it.
  firstPart = model: "-00001-of-${lib.fixedWidthNumber 5 (lib.length (digestsOf model))}.gguf";
  fileName = url: baseNameOf (lib.head (builtins.match "([^?#]*).*" url));
  keepList = lib.concatMapStringsSep " " lib.escapeShellArg (lib.attrNames models);
in
{
  imports = [ ./common.nix ];

  options.services.pascaline = {
    collectModelGarbage = mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = "Whether files of models that are no longer declared are deleted from the store at boot and after a switch.";
    };

    models = mkOption {
      default = { };
      example = lib.literalExpression ''
        {
          emily = {
            path = "/data/emily-sovereign-v4.Q4_K_M.gguf";
            sha256 = "2f3c…64 hexadecimal digits…";
          };
        }
      '';
      description = "Models to keep in the store, by name. `pascaline-model-<name>.service` downloads or copies each.";
      type = types.attrsOf (
        types.submodule (
          { name, config, ... }:
          {
            options = {
              url = mkOption {
                type = types.nullOr types.str;
                default = null;
                example = "https://models.example.org/emily.Q4_K_M.gguf";
                description = "Where to download the file. An interrupted download is resumed. Exactly one of `url` and `path` is set.";
              };
              path = mkOption {
                type = types.nullOr types.str;
                default = null;
                example = "/data/emily.Q4_K_M.gguf";
                description = "File on the host to copy from (a string: a Nix path would copy the model into the store).";
              };
              sha256 = mkOption {
                type = types.nullOr (types.either digest (types.nonEmptyListOf digest));
                default = null;
                example = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
                description = "The file's sha256, from a source other than the server it comes from. It must be set. For a split model, a list with one checksum for each part, in order; `url` or `path` then names the first part (`…-00001-of-0000N.gguf`), and the other parts must be beside it.";
              };
              file = mkOption {
                type = types.path;
                default = "${cfg.stateDir}/models/${name}/${
                  if config.url != null then fileName config.url else baseNameOf (toString config.path)
                }";
                defaultText = lib.literalExpression "\"\${config.services.pascaline.stateDir}/models/<name>/<file name>\"";
                example = "/data/models/emily.gguf";
                description = "Path of the verified file; for a split model, of its first part.";
              };
            };
          }
        )
      );
    };
  };

  config = lib.mkIf (models != { }) {
    services.pascaline.active = true;

    assertions = lib.concatLists (
      lib.mapAttrsToList (name: model: [
        {
          assertion = model.sha256 != null;
          message = "services.pascaline.models.${name}.sha256: not set, must be the file's 64 hexadecimal digits; compute it with: sha256sum FILE";
        }
        {
          assertion = (model.url == null) != (model.path == null);
          message = "services.pascaline.models.${name}: set exactly one of url and path";
        }
        {
          assertion =
            lib.length (digestsOf model) == 1
            || lib.all (place: lib.hasSuffix (firstPart model) place) [
              (fileName (toString (if model.url != null then model.url else model.path)))
              (toString model.file)
            ];
          message = "services.pascaline.models.${name}.sha256: ${toString (lib.length (digestsOf model))} checksums are for a split model of as many parts, so the file's name must end in ${firstPart model}; name the first part, or give the one checksum of a whole file";
        }
      ]) models
    );

    systemd.services =
      lib.mapAttrs' (
        name: model:
        lib.nameValuePair "pascaline-model-${name}" {
          description = "Model ${name} in the store";
          wantedBy = [ "multi-user.target" ];
          wants = lib.optional (model.url != null) "network-online.target";
          inherit (inStore) requires;
          after = inStore.after ++ lib.optional (model.url != null) "network-online.target";
          unitConfig.RequiresMountsFor = lib.optional (model.path != null) model.path;
          startLimitIntervalSec = 0;
          serviceConfig = hardening // {
            Type = "oneshot";
            RemainAfterExit = true;
            ExecStart = exec [
              (lib.getExe cfg.package)
              "models"
              "add"
              name
              (if model.url != null then model.url else model.path)
              "--sha256=${lib.concatMapStringsSep "," toString (digestsOf model)}"
              "--target=${model.file}"
              # The declaration counts: another checksum than before means another file.
              "--replace"
            ];
            User = cfg.user;
            TimeoutStartSec = "infinity";
            Restart = "on-failure";
            # Between two attempts it stays "activating", so that an instance that waits for it keeps waiting instead of failing.
            RestartMode = "direct";
            RestartSec = 10;
            RestartSteps = 5;
            RestartMaxDelaySec = 600;
            # Another attempt would find the same wrong checksum, or the same file that is no model.
            RestartPreventExitStatus = "2 3";
            ReadWritePaths = [ cfg.stateDir ];
            # A model is downloaded, or copied from this host.
            PrivateNetwork = model.url == null;
            # A model's path is often under /home.
            ProtectHome = "read-only";
          };
        }
      ) models
      // {
        # Not by tmpfiles: a data disk for which the boot does not wait may be mounted after they ran.
        pascaline-store = {
          description = "Folder of the model store";
          unitConfig.RequiresMountsFor = [ cfg.stateDir ];
          serviceConfig = hardening // {
            Type = "oneshot";
            RemainAfterExit = true;
            ExecStart = exec [
              "${pkgs.coreutils}/bin/install"
              "--directory"
              "--owner=${cfg.user}"
              "--group=${config.users.users.${cfg.user}.group or "pascaline"}"
              "--mode=0750"
              cfg.stateDir
            ];
            # Root, to make a folder anywhere and change its owner.
            CapabilityBoundingSet = [
              "CAP_CHOWN"
              "CAP_DAC_OVERRIDE"
              "CAP_FOWNER"
            ];
            # chown is a call of @privileged.
            SystemCallFilter = "@system-service";
            # In a user namespace of its own, root could not make a user of the host the owner.
            PrivateUsers = false;
            # The store may be a folder under /home or on a data disk; /usr, /boot and /etc stay read-only.
            ProtectHome = false;
            ProtectSystem = "full";
            PrivateNetwork = true;
            RestrictAddressFamilies = [ "AF_UNIX" ];
          };
        };
      }
      // lib.optionalAttrs cfg.collectModelGarbage {
        pascaline-model-gc = {
          description = "Delete models that are no longer declared";
          wantedBy = [ "multi-user.target" ];
          inherit (inStore) requires after;
          path = [ pkgs.coreutils ];
          script = ''
            cd ${lib.escapeShellArg "${cfg.stateDir}/models"} 2>/dev/null || exit 0
            for model in *; do
              [ -d "$model" ] || continue
              for keep in ${keepList}; do [ "$model" != "$keep" ] || continue 2; done
              echo "deleting model $model, which is no longer declared"
              rm -r -- "$model"
            done
          '';
          serviceConfig = hardening // {
            Type = "oneshot";
            User = cfg.user;
            PrivateNetwork = true;
            RestrictAddressFamilies = [ "AF_UNIX" ];
            ReadWritePaths = [ cfg.stateDir ];
          };
        };
      };
  };
}
