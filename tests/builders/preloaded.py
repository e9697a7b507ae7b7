"""What runs and evaluations import, for a process that starts many."""

import finetune.data.prior
import finetune.evaluation.measurement
import finetune.memory.fit
import finetune.memory.report
import finetune.run.failures
import finetune.run.stage_run  # noqa: F401
from adapters.errors import quiet_libraries

quiet_libraries()
