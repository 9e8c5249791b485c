"""Google Cloud on loopback addresses, for the clients of Google's own: what `make rehearse` and the tests of the cloud run on.

    image.py        the project's image as a folder
    container.py    a command in an image: its files, its processes, its user
    google.py       HTTPS and gRPC for every host of Google's; faults; a count of what was asked
    storage.py      Cloud Storage, over a folder
    jobs.py         Vertex AI's API: pipeline jobs, custom jobs, schedules
    executor.py     what Vertex AI does with a pipeline job: tasks, retries, custom jobs, cancelling
    dataflow.py     Dataflow's API
    beam.py         what Dataflow does with a job: Beam's worker in containers
    world.py        a network of one machine in which these are Google's hosts
    proxy.py        the same for a process that has no such network, of one host
    certificates.py what either shows for HTTPS and gRPC
    rehearse.py     `make rehearse`

A request that no service knows is answered 404 and fails whoever asked.
"""
