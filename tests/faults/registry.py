"""What can break a store or a run, R1 to R26: the rule of each, and the tests that hold it.

`python -m tests.faults.registry` prints the table of docs/faults.md.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- the table -->", "<!-- its end -->"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault."""

    name: str
    rule: str
    tests: tuple[str, ...]
    """FILE::TEST below tests/."""
    long: tuple[str, ...] = ()
    """Parts of `make faults`."""
    not_applied: str = ""
    """What of the rule does not apply, and why."""


STORE = "cache/test_store_"
FAULTS = {
    "R1": Fault(
        "the builder is killed at a random moment",
        "until the same command has ended there is no store to train on; then its bytes are those of an unbroken "
        "build, and nothing finished was made again",
        (
            f"{STORE}machine.py::test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes",
            f"{STORE}killed.py::test_finished_blocks_and_shards_are_not_computed_again",
            "pipeline/test_build.py::test_a_kill_at_any_moment_is_survived",
            "pipeline/test_train.py::test_an_unfinished_store_is_refused",
        ),
        ("builder",),
    ),
    "R2": Fault(
        "the builder is killed at each failpoint",
        "as R1",
        (
            f"{STORE}killed.py::test_killed_build_resumes_to_identical_bytes",
            "pipeline/test_build.py::test_a_killed_build_resumes_to_the_same_bytes",
        ),
        ("failpoint",),
    ),
    "R3": Fault(
        "a Dask worker or the scheduler is killed, or a job is told to end",
        "the build ends well or in one line, and the same command goes on to the same bytes",
        (
            "pipeline/test_cluster.py::test_a_worker_killed_in_the_middle_changes_no_byte",
            "pipeline/test_cluster.py::test_what_a_build_has_finished_stays_when_its_workers_or_the_scheduler_are_lost",
            "pipeline/test_cluster.py::test_what_kills_every_worker_is_named",
            "pipeline/test_stop.py::test_a_build_in_several_processes_stops_and_goes_on_to_the_same_store",
            "pipeline/test_shares.py::test_shares_at_once_with_one_killed_make_the_same_bytes",
        ),
        ("worker",),
    ),
    "R4": Fault(
        "the disk is full, or a limit of the system is reached",
        "one line with the place, the bytes where they are known, and what to do; what was finished stays, and with "
        "room the same command goes on to the same bytes",
        (
            f"{STORE}disk.py::test_a_full_disk_is_one_line_with_the_bytes_needed_and_the_build_goes_on",
            f"{STORE}at_fault.py::test_a_full_disk_while_a_store_is_pulled_is_named_and_the_same_command_goes_on",
            "faults/test_systems.py::test_a_disk_that_fills_up_ends_a_build_in_one_line_and_room_lets_it_go_on",
            "faults/test_systems.py::test_a_disk_that_fills_up_ends_a_training_in_one_line_and_room_lets_it_go_on",
            "faults/test_systems.py::test_files_that_may_not_grow_are_named_and_the_same_command_goes_on",
            "faults/test_systems.py::test_a_process_with_few_open_files_works_or_says_so",
            "pipeline/test_forecast.py::test_bytes_are_no_less_than_what_is_built",
        ),
    ),
    "R5": Fault(
        "a shard is cut short",
        "verify names it, nothing is read from it, repair makes it anew and nothing else",
        (
            f"{STORE}damage.py::test_a_truncated_shard_is_found_by_the_quick_check_and_not_opened",
            f"{STORE}read.py::test_a_shard_too_short_for_an_index_is_refused",
            f"{STORE}repair.py::test_every_single_file_is_mended_from_the_store_or_the_images",
        ),
        ("steps",),
    ),
    "R6": Fault(
        "a bit of any file is flipped",
        "each is found by its file's name, and none is read as data",
        (
            f"{STORE}repair.py::test_flipped_bits_are_found_with_file_rows_and_images",
            f"{STORE}verified.py::test_no_flipped_bit_is_ever_read_as_data",
            f"{STORE}damage.py::test_a_flipped_bit_in_the_commit_mark_is_found",
            f"{STORE}damage.py::test_a_block_with_a_flipped_bit_is_set_aside_at_the_commit_and_done_again",
        ),
        ("flips",),
    ),
    "R7": Fault(
        "a shard is missing, exchanged, or another store's",
        "found, named, and not read",
        (
            f"{STORE}damage.py::test_a_missing_shard_is_found_by_the_quick_check_and_not_opened",
            f"{STORE}damage.py::test_swapped_shards_and_foreign_files_are_found",
            f"{STORE}verified.py::test_two_shards_of_equal_size_that_were_exchanged_are_found",
        ),
        not_applied="chunks that were never written: a shard is written whole, in one file",
    ),
    "R8": Fault(
        "two builders at once",
        "one is refused in one line; builders that share a store make the bytes of one",
        (
            f"{STORE}refusals.py::test_a_second_builder_is_turned_away_and_a_killed_one_is_not_in_the_way",
            f"{STORE}shared.py::test_builders_that_share_a_store_make_the_same_one",
            f"{STORE}shared.py::test_a_block_that_another_worker_finished_meanwhile_is_left_where_it_is",
            "faults/test_systems.py::test_a_disk_without_locks_is_named_with_what_to_do",
        ),
        not_applied="building without a lock: a file system without locks is refused",
    ),
    "R9": Fault(
        "a store is read while it is built or repaired",
        "a reader sees what was committed, or one line",
        (
            "faults/test_readers.py::test_a_reader_beside_a_build_sees_nothing_or_all",
            "faults/test_readers.py::test_a_reader_beside_a_repair_sees_right_rows_or_one_line",
        ),
    ),
    "R10": Fault(
        "a store was made from something else",
        "refused with the name of the difference and both values; a moved or copied store is the same",
        (
            f"{STORE}manifest.py::test_a_change_shows_in_the_products_it_shapes_and_in_no_earlier_one",
            f"{STORE}refusals.py::test_another_manifest_is_refused_by_the_name_of_the_difference",
            f"{STORE}refusals.py::test_training_refuses_a_store_made_from_something_else",
            f"{STORE}roundtrip.py::test_moving_and_copying_the_folder_changes_nothing",
            "pipeline/test_build.py::test_another_setting_is_refused_by_its_name",
            "test_cli.py::test_train_refuses_a_store_whose_annotations_have_changed",
            "pipeline/test_trained_on.py::test_other_bytes_of_equal_settings_are_refused_until_they_are_accepted",
            "pipeline/test_manifest_names.py::test_a_difference_has_the_name_of_its_setting",
        ),
        not_applied="other bytes of an image of the same name and size: a store does not record images' bytes",
    ),
    "R11": Fault(
        "an image is damaged or of a rare kind",
        "left out with its reason up to a limit, or read by a stated rule; counts add up",
        (
            "pipeline/test_bad_images.py::test_bad_images_are_left_out_with_their_reason",
            "pipeline/test_bad_images.py::test_one_image_too_many_stops_the_build_and_is_taken_in_once_mended",
            "pipeline/test_bad_images.py::test_an_image_of_another_size_is_bad",
            "pipeline/test_images.py::test_a_mode_is_read_by_its_rule",
            "pipeline/test_images.py::test_an_image_that_is_too_large_is_named_with_a_cure",
            "pipeline/test_images.py::test_an_image_is_turned_where_the_turned_size_is_the_stated_one",
        ),
    ),
    "R12": Fault(
        "an image has no box, or more than are kept",
        "its rows are valid, and a step with it is finite",
        (
            f"{STORE}roundtrip.py::test_images_without_rows_have_records_of_length_zero",
            "ezsd/test_detector.py::test_losses_are_finite_without_boxes_or_regions",
            "ezsd/test_losses.py::test_classification_of_nothing_is_zero_with_zero_gradient",
            "ezsd/test_dataset.py::test_images_may_lack_boxes_or_regions",
            "ezsd/test_proposals.py::test_limits_keep_the_best",
        ),
    ),
    "R13": Fault(
        "a box is degenerate, outside, or no number",
        "one rule for all, and what it drops is counted; no row of a store is not finite",
        (
            "ezsd/test_annotations.py::test_every_kept_box_obeys_the_convention_and_the_rest_is_counted",
            "ezsd/test_annotations.py::test_a_tiny_box_survives",
            "ezsd/test_annotations.py::test_a_wrong_value_is_refused_with_its_place",
            f"{STORE}refusals.py::test_bad_rows_are_refused_by_name_and_image",
        ),
    ),
    "R14": Fault(
        "teacher or detector give what is no number",
        "no such row is written or read; a training stops with the parts of the loss and the step's images",
        (
            f"{STORE}refusals.py::test_bad_rows_are_refused_by_name_and_image",
            f"{STORE}read.py::test_a_row_that_is_not_finite_is_refused_with_image_and_field",
            "pipeline/test_train.py::test_a_loss_that_is_not_finite_stops_with_its_parts",
        ),
        not_applied="computing a shard again in float32: the build stops instead, and names the image",
    ),
    "R15": Fault(
        "an annotation file is wrong",
        "all that is wrong is said with its place, and nothing is left out in silence",
        (
            "ezsd/test_annotations.py::test_a_file_that_is_no_json_object_is_refused",
            "ezsd/test_annotations.py::test_a_missing_or_wrong_list_is_refused",
            "pipeline/test_check.py::test_everything_wrong_is_told_in_one_pass_with_its_place",
            "pipeline/test_required.py::test_what_check_finds_wrong_is_refused_before_the_first_crop",
        ),
    ),
    "R16": Fault(
        "a name leads out of its folder",
        "refused; nothing outside is read, written or removed",
        (
            "ezsd/test_annotations.py::test_an_image_path_out_of_the_folder_is_refused",
            "ezsd/test_annotations.py::test_a_path_the_system_cannot_follow_is_refused_or_stays_inside",
            f"{STORE}contained.py::test_pull_writes_nothing_outside",
            f"{STORE}contained.py::test_nothing_outside_is_sent_mended_exported_or_removed",
            "pipeline/test_runs.py::test_a_checkpoint_names_no_files_but_its_own",
        ),
    ),
    "R17": Fault(
        "a file holds code",
        "never run",
        (
            "test_structure.py::test_nothing_runs_code_out_of_data",
            "ezsd/test_teacher.py::test_pickled_code_is_never_run",
            "pipeline/test_train.py::test_backbone_weights_that_run_code_are_refused",
        ),
    ),
    "R18": Fault(
        "a save of a checkpoint is killed, or the disk refuses it",
        "the newest whole checkpoint is taken, and nothing that was saved is lost; a failed save is an error",
        (
            "pipeline/test_runs.py::test_a_save_killed_anywhere_leaves_the_newest_whole_checkpoint",
            "pipeline/test_runs.py::test_a_damaged_checkpoint_is_passed_over_with_a_line",
            "pipeline/test_runs.py::test_a_full_disk_is_an_error_that_names_the_file_and_keeps_what_there_was",
            "faults/test_systems.py::test_folders_that_may_not_be_written_are_named_with_what_to_do",
        ),
        ("saves", "trainer"),
    ),
    "R19": Fault(
        "a training is broken off",
        "the same command trains bit for bit what an unbroken training does, on the CPU",
        (
            "pipeline/test_train.py::test_stop_and_resume_is_bit_for_bit_an_unbroken_run",
            "pipeline/test_train.py::test_all_that_a_step_reads_is_resumed",
            "pipeline/test_stop.py::test_the_documented_command_trains_with_several_processes_and_stops_after_the_same_step",
        ),
        ("trainer", "rank"),
        not_applied="a scaler of gradients: mixed precision is bf16, which has none",
    ),
    "R20": Fault(
        "processes that read images: however started, and killed",
        "the same rows; one line that names the process, and the same command goes on",
        (
            f"{STORE}read.py::test_a_data_loader_reads_the_same_however_its_workers_start",
            "pipeline/test_train.py::test_a_killed_reader_of_images_is_one_line_that_names_it_and_the_training_goes_on",
            "pipeline/test_train.py::test_readers_of_any_number_give_the_same_curve",
            "pipeline/test_train.py::test_readers_end_with_a_training_that_is_killed",
        ),
        ("reader",),
    ),
    "R21": Fault(
        "other numbers of workers, other orders, other blocks",
        "the same bytes",
        (
            f"{STORE}roundtrip.py::test_the_order_of_blocks_and_shards_does_not_show",
            f"{STORE}roundtrip.py::test_the_block_size_does_not_show",
            f"{STORE}roundtrip.py::test_two_worker_processes_write_the_same_store",
            "pipeline/test_build.py::test_two_workers_make_the_same_bytes_as_one",
        ),
    ),
    "R22": Fault(
        "any order of building, killing, damaging, mending, cleaning and reading",
        "a store does what a model of it in memory does",
        (
            f"{STORE}machine.py::TestStoreMachine",
            f"{STORE}machine.py::test_any_number_of_rows_and_any_width_comes_back_as_written",
        ),
        ("steps",),
    ),
    "R23": Fault(
        "annotations hold boxes of novel classes",
        "not a byte of a store or a run depends on them",
        (
            "pipeline/test_build.py::test_novel_boxes_cannot_reach_the_store",
            "pipeline/test_learned.py::test_novel_boxes_change_no_byte",
            "pipeline/test_build.py::test_no_byte_of_a_store_comes_from_the_validation_files",
            "ezsd/test_annotations.py::test_nothing_about_novel_boxes_reaches_training",
            "pipeline/test_audit.py::test_a_novel_object_with_a_base_label_in_the_store_is_found_and_named",
        ),
    ),
    "R24": Fault(
        "a store or a run is of another version",
        "read, or refused with what to do",
        (
            f"{STORE}refusals.py::test_another_format_version_is_refused_by_every_door",
            f"{STORE}document.py::test_a_schema_that_changes_takes_a_new_format_version",
            "pipeline/test_train.py::test_a_run_that_recorded_other_settings_of_stage_one_goes_on",
            "pipeline/test_images.py::test_a_store_that_does_not_say_how_it_read_images_is_read_as_it_was",
        ),
        not_applied="stores of released versions as fixtures: nothing is released yet",
    ),
    "R25": Fault(
        "there is no network",
        "a teacher whose files are not on this machine is refused in one line that says the way round",
        (
            "ezsd/test_teacher.py::test_a_hub_that_cannot_be_reached_is_asked_once",
            "ezsd/test_teacher.py::test_a_tag_without_a_network_is_refused_with_the_way_round",
            "ezsd/test_teacher.py::test_a_hub_model_without_a_network_is_refused",
        ),
    ),
    "R26": Fault(
        "storage is slow, flaky, or of an odd kind",
        "no wrong byte; retries are counted, then one line with the place, and the same command goes on",
        (
            "faults/test_network.py::test_a_store_goes_to_a_flaky_server_and_back_without_a_wrong_byte",
            "faults/test_network.py::test_rows_read_from_a_flaky_server_are_right_or_refused",
            "faults/test_network.py::test_a_server_that_stays_so_is_one_line_in_bounded_time_and_the_same_call_goes_on",
            "faults/test_network.py::test_a_pull_without_its_server_is_one_line_of_the_command_and_goes_on",
            "faults/test_systems.py::test_a_disk_without_locks_is_named_with_what_to_do",
            "faults/test_systems.py::test_a_disk_that_flushes_no_folders_is_named_with_what_to_do",
            f"{STORE}verified.py::test_an_error_of_the_system_is_not_called_damage",
        ),
        not_applied="retries on a local disk: an error of it is one line at once",
    ),
}


def table():
    """The Markdown table of docs/faults.md."""
    lines = ["| | fault | rule | tests | long form |", "|---|---|---|---|---|"]
    for number, fault in FAULTS.items():
        files = {}
        for test in fault.tests:
            file, _, name = test.partition("::")
            files.setdefault(file, []).append(f"`{name.removeprefix('test_')}`")
        tests = "; ".join(f"[{file}](../tests/{file}): {', '.join(names)}" for file, names in files.items())
        rule = f"{fault.rule}. Does not apply: {fault.not_applied}" if fault.not_applied else fault.rule
        parts = ", ".join(f"`{part}`" for part in fault.long)
        lines.append(f"| {number} | {fault.name} | {rule} | {tests} | {parts} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    sys.stdout.write(table() + "\n")
