"""What several test files need.

Made data:
    datasets.py         a dataset as the trainer reads it
    raw_data.py         raw archives as the conversion reads them

Servers of this machine:
    loopback.py         HTTP that answers what a test says
    submitting.py       a bucket, and a Google that takes jobs
    mlflow_server.py    MLflow's own server, with passwords
    browser.py          Chromium, which shows the reports

Processes:
    processes.py        a module of the tests as a process; a process that stops at a place in its work, and waits
    copies.py           commands of this project without the time that their imports take
    ending.py           trainer.task or eval.task, killed at a place and started again
    replicas.py         steps on one replica and on several
    evaluations.py      an evaluation on one replica and on several

Values to compare with:
    oracle.py           the losses, by the formulas of the papers
    lifted.py           a network whose ReLUs rounding does not turn
"""
