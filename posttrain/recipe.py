"""Recipes: strict, typed, immutable descriptions of a stage. `posttrain.recipe_file` reads them from YAML.

This is the door: every recipe and section can be imported from here, wherever it is written.
"""

from __future__ import annotations

import re
import types
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from posttrain.distill_recipe import (
    DistillRecipe,
    DistillTeacherSection,
    EndpointSection,
    GenerationSection,
    OutputSection,
    RecordingsSection,
    RejectionSection,
    SelectionSection,
)
from posttrain.eval_recipe import (
    BenchmarkOptions,
    BenchmarkSection,
    ContaminationSection,
    EvalRecipe,
    EvalSuiteSection,
    JudgeSection,
    ServedModelSection,
)
from posttrain.grpo_recipe import (
    AlgorithmSection,
    AuditSection,
    FaultsSection,
    GrpoRecipe,
    GrpoRouterSection,
    ParitySection,
    RolloutSection,
)
from posttrain.grpo_sections import (
    CriticSection,
    CurriculumSection,
    GrpoCheckpointSection,
    LearnerSection,
    TeacherSection,
)
from posttrain.lora_section import LoraSection
from posttrain.reward_model_recipe import (
    HeldOutSection,
    PairDatasetSection,
    RewardModelRecipe,
    RewardTrainingSection,
)
from posttrain.sections import (
    BuildSection,
    CheckpointSection,
    DatasetSection,
    EnvironmentSection,
    EvalSection,
    ModelSection,
    OptimizerSection,
    Recipe,
    RecipeError,
    RewardSection,
    RouterSection,
    SamplerSection,
    Section,
    require_checkpoint,
)
from posttrain.sft_recipe import (
    DecontaminationSection,
    MtpSection,
    PreparationSection,
    SftRecipe,
    SftRouterSection,
    SftTeacherSection,
    TrainingSection,
    ValidationSection,
)
from posttrain.upcycle_recipe import UpcycleRecipe

__all__ = [
    "RECIPES",
    "AlgorithmSection",
    "AuditSection",
    "BenchmarkOptions",
    "BenchmarkSection",
    "BuildSection",
    "CheckpointSection",
    "ContaminationSection",
    "CriticSection",
    "CurriculumSection",
    "DatasetSection",
    "DecontaminationSection",
    "DistillRecipe",
    "DistillTeacherSection",
    "EndpointSection",
    "EnvironmentSection",
    "EvalRecipe",
    "EvalSection",
    "EvalSuiteSection",
    "FaultsSection",
    "GenerationSection",
    "GrpoCheckpointSection",
    "GrpoRecipe",
    "GrpoRouterSection",
    "HeldOutSection",
    "JudgeSection",
    "LearnerSection",
    "LoraSection",
    "ModelSection",
    "MtpSection",
    "OptimizerSection",
    "OutputSection",
    "PairDatasetSection",
    "ParitySection",
    "PipelineRecipe",
    "PreparationSection",
    "Recipe",
    "RecipeError",
    "RecordingsSection",
    "RejectionSection",
    "RewardModelRecipe",
    "RewardSection",
    "RewardTrainingSection",
    "RolloutSection",
    "RouterSection",
    "SamplerSection",
    "Section",
    "SelectionSection",
    "ServedModelSection",
    "SftRecipe",
    "SftRouterSection",
    "SftTeacherSection",
    "StageSection",
    "TeacherSection",
    "TrainingSection",
    "UpcycleRecipe",
    "ValidationSection",
    "require_checkpoint",
]


class StageSection(Section):
    """A stage of a pipeline: a recipe file and what to change in it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # also its folder in the run directory
    recipe: str  # path, from where the command is started
    overrides: tuple[str, ...] = ()
    after: tuple[str, ...] = ()  # stages that it needs although no path of its recipe says so

    @model_validator(mode="after")
    def _is_no_stale_one(self) -> StageSection:
        if re.search(r"\.stale-[0-9]+$", self.name):
            raise ValueError(f"name={self.name}: a folder of that name is an earlier run put aside; take another name")
        return self


class PipelineRecipe(Recipe):
    """Stages that use what others make. `{run_dir}` in an override is the pipeline's run directory."""

    stage: Literal["pipeline"] = "pipeline"
    stages: tuple[StageSection, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> PipelineRecipe:
        twice = [name for name, count in Counter(stage.name for stage in self.stages).items() if count > 1]
        if twice:
            raise ValueError(f"stages: two are named {twice[0]!r} and would share a folder; give each its own name")
        return self


RECIPES: Mapping[str, type[Recipe]] = types.MappingProxyType(
    {
        "sft": SftRecipe,
        "reward_model": RewardModelRecipe,
        "grpo": GrpoRecipe,
        "distill": DistillRecipe,
        "eval": EvalRecipe,
        "upcycle": UpcycleRecipe,
        "pipeline": PipelineRecipe,
    }
)
