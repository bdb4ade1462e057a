# Two machines: one serves, the other scrapes it and raises an alert when it is gone.
start_all()
host.wait_until_succeeds("curl --fail --silent http://127.0.0.1:30001/readyz", timeout=180)
watch.wait_for_unit("prometheus.service")
watch.wait_for_unit("alertmanager.service")
watch.wait_until_succeeds(
    "curl --silent 'http://127.0.0.1:9090/api/v1/query?query=pascaline_engine_up' | grep '\"1\"'", timeout=60
)

with subtest("a host that is gone is alerted"):
    host.shutdown()
    # Of Alertmanager, which hears of no alert that is only pending.
    watch.wait_until_succeeds(
        "curl --silent http://127.0.0.1:9093/api/v2/alerts | grep -E 'AgentDown|FleetHostMissing'", timeout=600
    )
