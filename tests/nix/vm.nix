# Virtual machines: a serving host and a fleet of two, with the fake engine and the fake NVML instead of a GPU.
{ self, pkgs }:
let
  inherit (pkgs) lib;
  fakeEngine = pkgs.writeShellScriptBin "python" ''
    exec ${lib.getExe pkgs.python312} ${../fake_engine}/fake_engine.py "$@"
  '';
  common = {
    imports = [ self.nixosModules.default ];
    nixpkgs.pkgs = lib.mkForce pkgs;
    services.pascaline.enginePackage = fakeEngine;
    virtualisation.memorySize = 2048;
  };
  instance = {
    gpus = [ ];
    settings = {
      model = "builtin:smollm2-135m";
      host = "0.0.0.0";
      agent_host = "0.0.0.0";
      device = "cpu";
    };
  };
  serving = {
    imports = [ common ];
    services.pascaline.package = pkgs.pascaline-app;
    services.pascaline.instances.tiny = instance;
    networking.firewall.enable = false;
  };
  script = name: builtins.readFile (./vm + "/${name}.py");
in
{
  vm-serve = pkgs.testers.runNixOSTest {
    name = "pascaline-serve";
    nodes.host = serving;
    testScript = script "serve";
  };

  vm-fleet = pkgs.testers.runNixOSTest {
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
