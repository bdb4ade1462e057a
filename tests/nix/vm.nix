# Virtual machines: a serving host and a fleet of two, with the fake engine and the fake NVML instead of a GPU. They need KVM, so
# `nix flake check` does not build them: nix build .#vm-tests.serve .#vm-tests.fleet
{ pkgs }:
let
  inherit (pkgs) lib;
  fakeEngine = pkgs.writeShellScriptBin "python" ''
    exec ${lib.getExe pkgs.python312} ${../fake_engine}/fake_engine.py "$@"
  '';
  nvmlSource = ../../python/pascaline/src/pascaline/gpu/fake_nvml;
  fakeNvml = pkgs.runCommandCC "fake-nvml" { } ''
    mkdir $out
    $CC -std=c11 -D_GNU_SOURCE -O2 -shared -fPIC -pthread -o $out/libnvidia-ml.so.1 ${nvmlSource}/fake_nvml.c
  '';
  common = {
    # Without the flake's overlay: the machines' package set is this one, which has it.
    imports = [ ../../modules ];
    services.pascaline.enginePackage = fakeEngine;
    virtualisation.memorySize = 2048;
  };
  instance = {
    gpus = [ ];
    settings = {
      model = "builtin:smollm2-135m";
      host = "0.0.0.0";
      agent_host = "0.0.0.0";
      allow_unauthenticated = true;
      device = "cpu";
      # The fake engine takes nothing; the plan is of the real one, which these machines have no memory for.
      allow_overcommit = true;
    };
  };
  serving = {
    imports = [ common ];
    services.pascaline = {
      package = pkgs.pascaline-builtin;
      instances.tiny = instance;
      exporter.enable = true;
    };
    systemd.services.pascaline-exporter.environment = {
      LD_LIBRARY_PATH = lib.mkForce "${fakeNvml}";
      PASCALINE_FAKE_NVML = "${nvmlSource}/demo.nvml";
    };
    networking.firewall.enable = false;
  };
  script = name: builtins.readFile (./vm + "/${name}.py");
in
{
  serve = pkgs.testers.runNixOSTest {
    name = "pascaline-serve";
    nodes.host = serving;
    testScript = script "serve";
  };

  fleet = pkgs.testers.runNixOSTest {
    name = "pascaline-fleet";
    nodes = {
      host = serving;
      watch = {
        imports = [ common ];
        services.pascaline.monitoring = {
          enable = true;
          grafana.enable = false;
          scrapeInterval = "5s";
          alertmanager.webhookUrl = "http://127.0.0.1:9099/";
          agents = [
            {
              instance = "host";
              address = "host:30001";
              labels.name = "tiny";
            }
          ];
        };
      };
    };
    testScript = script "fleet";
  };
}
