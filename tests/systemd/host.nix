# The host that the systemd tests boot: every kind of unit, without a GPU, and quick to notice trouble.
let
  digest = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
  onCpu = index: settings: {
    gpus = [ ];
    settings = {
      device = "cpu";
      context_length = 512;
      port = 30000 + 10 * index;
      agent_port = 30001 + 10 * index;
      probe_interval = 2;
    }
    // settings;
  };
in
{
  hardware.pascaline.driver.enable = true;
  services.pascaline = {
    models = {
      # The built-in model's file, which the test puts there.
      smollm2 = {
        path = "/srv/smollm2.gguf";
        sha256 = digest;
      };
      # The same file by a link, in whose percent sign systemd must not see its own.
      linked = {
        url = "file:///srv/smoll%6D2.gguf";
        sha256 = digest;
      };
      late = {
        path = "/srv/late.gguf";
        sha256 = digest;
      };
      wrong = {
        path = "/srv/smollm2.gguf";
        sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
      };
    };
    collectModelGarbage = true;

    instances = {
      main = onCpu 0 { } // {
        model = "smollm2";
        apiKeyFile = "/etc/pascaline/api-key";
        memoryMax = "12G";
      };
      # Waits for a model that comes later.
      late = onCpu 1 { } // {
        model = "late";
      };
      # Asks for more than the model has, which starting again does not change.
      refused = onCpu 2 { context_length = 1000000; } // {
        model = "smollm2";
      };
      # Computes on the CPU like the others; its device rules are those of a GPU.
      gpu = onCpu 3 { } // {
        model = "smollm2";
        gpus = [ 0 ];
      };
    };

    exporter.enable = true;
    router = {
      enable = true;
      workers = [ "http://127.0.0.1:30000" ];
      apiKeyFile = "/etc/pascaline/api-key";
    };
  };
}
