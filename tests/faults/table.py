"""What can go wrong, what is promised, and the test that holds the promise. `docs/reliability.md` is made from it."""

from typing import NamedTuple


class Row(NamedTuple):
    """One fault.

    Attributes:
        fault: What goes wrong.
        promise: What holds all the same.
        tests: `file::function` below `tests/`; empty where there is none, and then `promise` says why.
    """

    fault: str
    promise: str
    tests: tuple[str, ...]


SIGNALS, PROCESSES = "faults/test_signals.py", "faults/test_processes.py"
SEALED, STORAGE = "checkpoint/test_sealed.py", "checkpoint/test_plain_storage.py"
TRUST, TORCHRUN = "faults/test_trust.py", "faults/test_torchrun.py"
RESUME, TRAINER = "training/test_resume.py", "training/test_trainer.py"
GPU = "gpu/test_faults.py"
BAD_FILES, IMAGE = "data_pipelines/importers/test_bad_files.py", "data_pipelines/media/test_image.py"

ROWS = (
    Row(
        "SIGTERM, SIGINT or SIGUSR1 at any step",
        "all ranks save the same step and exit 75; continued, the run ends bit by bit as if it had not been stopped",
        (
            f"{SIGNALS}::test_sigterm_of_any_rank_after_any_step",
            f"{RESUME}::test_stopped_by_sigterm_at_any_step",
        ),
    ),
    Row(
        "a signal while the run starts, waits for data, is inside a step, evaluates or saves",
        "the step in progress is dropped before its weights move; what is saved is whole",
        (
            f"{SIGNALS}::test_a_signal_to_one_rank_stops_both_with_everything_saved",
            f"{SIGNALS}::test_the_step_in_progress_is_dropped_before_its_weights_move",
            "training/test_validation.py::test_a_stop_request_does_not_wait_for_a_measurement",
        ),
    ),
    Row(
        "the time limit of the job",
        "SIGUSR1 reaches every rank through torchrun as `nemovl launch` renders it, and the job is requeued once; a "
        "run that knows its end (`trainer.time_limit_s`, SLURM_JOB_END_TIME) saves before it",
        (
            f"{TORCHRUN}::test_usr1_reaches_every_rank_and_everything_is_saved",
            f"{SIGNALS}::test_a_run_stops_itself_before_its_time_is_over",
            "launch/test_node.py::test_a_save_may_take_longer_than_torchruns_patience",
            "launch/test_slurm.py::test_the_script_acts_on_how_the_run_ended",
            f"{GPU}::test_usr1_saves_on_every_rank_and_asks_to_be_started_again",
        ),
    ),
    Row(
        "the signal reaches data workers too",
        "they ignore it; the save happens",
        (f"{SIGNALS}::test_data_workers_do_not_mind_the_signal",),
    ),
    Row(
        "SIGKILL of one rank",
        "the others stop within seconds with one sentence; torchrun's restart continues to the same end",
        (
            f"{PROCESSES}::test_a_killed_rank_stops_the_others_within_seconds_and_they_say_so",
            "training/test_peers.py::test_the_others_end",
            f"{TORCHRUN}::test_a_killed_rank_is_restarted_once_and_the_run_ends_as_if_nothing_had_been",
            f"{GPU}::test_a_killed_rank_is_restarted_and_the_run_ends_as_the_clean_one",
        ),
    ),
    Row(
        "a hang",
        "stacks of every rank that still runs are in the stage folder, under `stacks`, with the collective that it "
        "waits in; exit 1",
        (
            f"{PROCESSES}::test_a_frozen_rank_is_named_by_the_stacks_of_the_others",
            f"{PROCESSES}::test_data_that_do_not_come_end_the_run_with_stacks_of_every_rank",
            f"{PROCESSES}::test_a_collective_that_takes_too_long_speaks_before_the_watchdog",
        ),
    ),
    Row(
        "killed while a checkpoint is written",
        "at every write, flush and rename: a good checkpoint is there, and the next start removes the rest",
        (
            f"{SEALED}::test_death_at_any_change_of_the_file_system_leaves_a_loadable_checkpoint",
            f"{SEALED}::test_death_in_the_middle_of_a_file",
            f"{PROCESSES}::test_killed_anywhere_and_started_again",
            f"{PROCESSES}::test_killed_at_every_change_that_a_save_makes_on_the_disk",
        ),
    ),
    Row(
        "a save in the background fails",
        "the next step says so; nothing is marked complete, nothing is deleted",
        (f"{SEALED}::test_what_the_writer_of_an_asynchronous_save_met_is_told_and_nothing_is_marked",),
    ),
    Row(
        "disk full, quota, read-only",
        "space is asked for before a byte is written; a clear message, earlier checkpoints stay, the run can go on",
        (
            f"{SEALED}::test_space_is_asked_for_before_a_byte_is_written",
            f"{SEALED}::test_a_full_disk_while_tensors_are_written",
            f"{SEALED}::test_a_full_or_read_only_disk_at_the_seal",
        ),
    ),
    Row(
        "a flipped bit or a zeroed page",
        "refused by the name of the file; the checkpoint before is taken, and the log says so",
        (
            f"{SEALED}::test_one_flipped_byte_in_any_file_is_refused_by_name",
            f"{RESUME}::test_a_damaged_checkpoint_is_left_for_the_one_before",
        ),
    ),
    Row(
        "a truncated or missing file",
        "the same",
        (f"{SEALED}::test_files_that_are_not_those_that_were_saved",),
    ),
    Row(
        "files of two steps mixed",
        "refused by name",
        (f"{SEALED}::test_files_that_are_not_those_that_were_saved",),
    ),
    Row(
        "another number of data, tensor or context parallel ranks",
        "the same packs, and losses within 5e-6 of a run that never moved",
        ("faults/test_changed_layouts.py::test_ten_steps_after_the_move", "parallel/test_matrix.py::moved"),
    ),
    Row(
        "state that is forgotten",
        "killed at every step of twelve, between their micro-batches, or at random moments of a whole schedule, the "
        "end is the same bit by bit",
        (
            f"{PROCESSES}::test_killed_at_every_step_of_twelve",
            "faults/test_kill_schedule.py::test_random_moments_of_five_stages",
            "faults/test_kill_trials.py::test_random_moments",
            "test_demo.py::test_killed_at_random_moments_it_ends_with_the_same_weights",
        ),
    ),
    Row(
        "other options in a continued run",
        "refused with every difference; `checkpoint.accept_changes` names those that are wanted",
        (
            f"{TRAINER}::test_options_that_decide_nothing_may_change_and_others_are_refused_with_their_difference",
            f"{TRAINER}::test_accepted_changes_are_listed_and_the_run_goes_on",
        ),
    ),
    Row(
        "NaN or infinity on one rank",
        "nothing changes on any rank; the samples are named; after `trainer.max_bad_steps` the run stops",
        (
            "training/test_two_processes.py::test_a_bad_step_of_one_is_a_bad_step_of_all_and_its_samples_are_named",
            f"{TRAINER}::test_too_many_bad_steps_end_the_run_with_the_last_one_named",
        ),
    ),
    Row(
        "a spike of loss or gradient norm",
        "with `trainer.spike_sigma` the step changes nothing; the statistics are part of the checkpoint",
        (f"{PROCESSES}::test_a_spike_changes_nothing_and_is_counted_across_a_restart",),
    ),
    Row(
        "silent corruption of a weight",
        "found by hashes of replicas before every save and every `trainer.check_replicas_every` steps; rank and "
        "tensor are named",
        (
            f"{PROCESSES}::test_a_flipped_bit_of_one_rank_is_found_and_named",
            f"{PROCESSES}::test_with_three_replicas_the_broken_rank_is_named",
            f"{GPU}::test_a_flipped_bit_on_one_gpu_is_found",
        ),
    ),
    Row(
        "a truncated image, or bytes that are none",
        "that sample is left out and counted; too many end the run",
        (
            f"{IMAGE}::test_truncated_is_refused_not_filled_in",
            "data_pipelines/test_pack.py::test_truncated_image_leaves_only_its_own_pack_shorter",
            "data_pipelines/test_pack.py::test_run_stops_when_too_much_is_bad",
        ),
    ),
    Row(
        "a decompression bomb or an odd format",
        "refused before it is decoded",
        (
            f"{IMAGE}::test_other_files_and_bombs_are_refused",
            f"{BAD_FILES}::test_every_animal_is_rejected_by_its_own_reason",
        ),
    ),
    Row(
        "a sample that makes no sense",
        "rejected at import by its own reason",
        (f"{BAD_FILES}::test_every_animal_is_rejected_by_its_own_reason",),
    ),
    Row(
        "data that changed since the save",
        "a changed plan or manifest, or a shard of another size, is refused; a damaged sample or a shard that goes "
        "missing costs its samples, which are named and counted",
        (
            f"{RESUME}::test_changed_data_are_refused",
            "data_pipelines/test_shards.py::test_a_changed_or_missing_manifest_is_refused",
            "data_pipelines/test_shards.py::test_damage_is_found",
            "data_pipelines/test_storage.py::test_a_missing_shard_is_quarantined_by_sample",
        ),
    ),
    Row(
        "a malicious checkpoint",
        "nothing in a checkpoint is unpickled but small objects, and those by an allow-list: no code runs",
        (
            f"{STORAGE}::test_pickles_put_into_a_checkpoint_are_never_opened",
            f"{STORAGE}::test_objects_come_back_and_those_with_code_are_refused_unread",
            f"{STORAGE}::test_an_index_that_lies",
        ),
    ),
    Row(
        "a malicious model folder",
        "safetensors and JSON only: no code and no pickle of it is opened",
        ("convert/test_folders.py::test_pickles_and_code_of_a_stranger_are_never_run",),
    ),
    Row(
        "a malicious archive, path or URL",
        "refused; nothing outside the folder is read or written",
        (
            f"{BAD_FILES}::test_hostile_tar_members_are_left_out",
            f"{BAD_FILES}::test_every_animal_is_rejected_by_its_own_reason",
            "data_pipelines/test_storage.py::test_urls_that_cannot_be_read_are_refused",
        ),
    ),
    Row(
        "a malicious config",
        "options are data: an error, and no code runs",
        (
            f"{TRUST}::test_a_recipe_that_names_code_is_refused_and_runs_none",
            f"{TRUST}::test_a_config_of_a_run_folder_is_data",
            "launch/test_slurm.py::test_no_field_can_become_a_directive_or_a_command",
        ),
    ),
    Row(
        "a deletion that fails or is cut off",
        "old checkpoints go only after a newer one was read back; failures are told",
        (
            f"{SEALED}::test_a_purge_that_fails_is_told_and_stops_nothing",
            f"{SEALED}::test_nothing_is_deleted_for_a_checkpoint_that_the_disk_spoiled",
            f"{PROCESSES}::test_killed_anywhere_and_started_again",
        ),
    ),
    Row(
        "two jobs on one run folder",
        "the second is refused with the holder's name; a holder that is gone is followed",
        (
            "training/test_lock.py::test_a_run_of_another_machine_that_lives_keeps_its_folder",
            "training/test_lock.py::test_a_run_of_another_machine_that_is_gone_is_followed",
        ),
    ),
    Row(
        "no network, a tracker that is down",
        "one warning; the run needs neither",
        (
            f"{TRUST}::test_a_run_opens_no_connection",
            f"{TRUST}::test_a_tracker_that_fails_is_left_out_and_the_run_goes_on",
        ),
    ),
    Row(
        "damage in a conversion",
        "missing, foreign, swapped or misshapen tensors are refused by name",
        (
            "convert/test_mapping.py::test_damage_is_refused_by_name",
            "convert/test_folders.py::test_swapped_tensors_of_one_shape_are_caught_by_hash",
        ),
    ),
    Row(
        "a save slower than the scheduler's grace",
        "`nemovl launch slurm` says when the signal leaves less than it takes to write the planned bytes, and the log "
        "after the first save when it took too long (`checkpoint.grace_s`)",
        (
            f"{SIGNALS}::test_a_save_that_is_too_slow_for_the_schedulers_grace_is_told",
            "launch/test_slurm.py::test_a_short_lead_is_said_before_the_job_waits_in_the_queue",
        ),
    ),
)


def markdown() -> str:
    """The table."""
    lines = ["| fault | what holds | test |", "|---|---|---|"]
    for row in ROWS:
        names = "<br>".join(f"`{test.split('::')[1]}`" for test in row.tests)
        lines.append(f"| {row.fault} | {row.promise} | {names} |")
    return "\n".join(lines) + "\n"
