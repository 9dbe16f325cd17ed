"""vLLM as the engine: what runs inside its processes, and how they are started.

    command     in our interpreter: a configuration becomes vLLM's command line, and this process becomes vLLM
    serve       in vLLM's interpreter, from here on: its API server on a socket that was listening before
    front       its middleware: the routes of live weights, with our sequence and our refusals
    transfer    its weight-transfer backend, in every worker: reads a published directory
    plugin      what vLLM loads in each of its processes: registers the backend, ties their lives together

`serve`, `front`, `transfer` and `plugin` import nothing that vLLM's environment may lack: of this package only what
needs no more than msgspec and xxhash.
"""
