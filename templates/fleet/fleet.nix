# The inventory. A host is one line; `pascaline.lib` derives systems, scrape targets, router workers and firewall rules.
let
  # A c220g5 with a Tesla P4 that serves `emily`.
  p4 = address: mac: {
    inherit address;
    # CloudLab's experiment network hands out no addresses: this interface gets the one above.
    network = { inherit mac; };
    profile = "c220g5";
    gpu = {
      card = "tesla-p4";
      capability = "6.1";
    };
    instances = [ "emily" ];
  };
in
{
  models.emily = {
    path = "/data/models/emily.Q4_K_M.gguf";
    # sha256sum /data/models/emily.Q4_K_M.gguf
    sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
  };

  instances.emily = {
    model = "emily";
    settings.context_length = 4096;
  };

  hosts = {
    gpu-1 = p4 "10.10.1.1" "3c:fd:fe:00:00:01";
    watch = {
      address = "10.10.1.10";
      network.mac = "3c:fd:fe:00:00:10";
      profile = "c220g5";
      roles = [
        "monitoring"
        "router"
      ];
    };
  };

  # Where alerts are posted (what listens there is yours), and the file on each host with the key that protects the APIs.
  alertWebhook = "http://127.0.0.1:9099/alerts";
  apiKeyFile = "/etc/pascaline/api-key";

  # Who may send requests to the router. Grafana is reached through ssh, until grafanaClients and grafanaPasswordFile are set.
  clients = [ "10.10.1.0/24" ];
}
