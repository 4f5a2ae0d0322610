"""Training over several nodes: a step that starts a job on the cluster and answers for it.

The launching pod asks for no GPU. It makes the job (``job``), renews a lease (``lease``) and
follows the job to its end (``run``). The job's pods read and write the store directly
(``dpo.train.node``). Nothing here imports torch.
"""
