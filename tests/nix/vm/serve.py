# Boots a serving host: the unit becomes ready, answers, survives the death of its engine, drains and stops.
# `host` is the machine that the NixOS test driver provides.
host.wait_for_unit("pascaline-tiny.service")
host.wait_until_succeeds("curl --fail --silent http://127.0.0.1:30001/readyz", timeout=120)
host.succeed("curl --fail --silent http://127.0.0.1:30000/v1/models | grep tiny")

with subtest("the exporter sees both GPUs of the simulated driver"):
    host.wait_until_succeeds(
        "test $(curl --silent http://127.0.0.1:9836/metrics | grep -c '^nvidia_gpu_temperature_gpu{') = 2", timeout=60
    )

with subtest("the engine's death is seen, and it is restarted"):
    host.succeed(
        "kill -9 $(curl --silent http://127.0.0.1:30001/health | grep -o '\"engine_pid\":[0-9]*' | cut -d: -f2)"
    )
    host.wait_until_succeeds(
        "curl --silent http://127.0.0.1:30001/metrics | grep '^pascaline_engine_restarts_total{.*} 1.0'", timeout=60
    )
    host.wait_until_succeeds("curl --fail --silent http://127.0.0.1:30001/readyz", timeout=120)

with subtest("stopping drains and leaves nothing behind"):
    host.succeed("systemctl stop pascaline-tiny.service")
    host.succeed("test $(systemctl show -p Result --value pascaline-tiny.service) = success")
    host.fail("grep . /sys/fs/cgroup/pascaline.slice/pascaline-tiny.service/cgroup.procs")

with subtest("a second boot keeps state and cache"):
    host.succeed("touch /var/lib/pascaline-tiny/kept")
    host.shutdown()
    host.start()
    host.wait_until_succeeds("curl --fail --silent http://127.0.0.1:30001/readyz", timeout=180)
    host.succeed("test -e /var/lib/pascaline-tiny/kept")
