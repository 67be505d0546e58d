"""The process beside a server that says how it does: its metrics, whether it may get requests, whether it lives.

    GET /metrics   TorchServe's metrics, the workers' own and the monitor's, one text      exposition
    GET /ready     200: every worker READY, golden checks passed, no drain; else why not    readiness
    GET /live      200: the frontend answers; 503: it hangs or is gone                      liveness, in observer

    serve start ─► server.monitor_process ─► python -m detserve.monitor ─► observer ─► endpoint
    workers ─► prometheus-client's files ─► worker_files ┘ ▲ queue_times ◄─ TorchServe's counters, once a second

It is a process of its own so that nothing in it can hold up a request, and it ends with the server that it watches.
"""
