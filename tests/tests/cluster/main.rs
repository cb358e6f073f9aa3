//! GalleonFS in a real Kubernetes: what a user is promised, seen from where the user stands.
//!
//! The tests share one lab of three nodes and run one after another, each in a namespace of its own. They take minutes
//! and need root, so they run only when asked for: `make test-cluster`, or
//!
//! ```text
//! GALLEONFS_CLUSTER_TESTS=1 cargo test -p galleonfs-tests --test cluster [-- PART-OF-A-NAME]
//!   GALLEONFS_PROGRAM=file   test this program instead of target/release/galleonfs
//!   GALLEONFS_LAB_NAME=name  use this lab instead of `test`
//!   GALLEONFS_LAB_KEEP=1     leave the cluster running, for the next run or for a look
//! ```

mod claims;
mod failures;
mod idle;
mod pools;
mod replicated;
mod rights;
mod sanity;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use galleonfs_tests::lab::{Lab, Options, install};

use replicated::{api, concerns, failover, moves, network, replicas};
use world::World;

const LAB: &str = "test";
const NODES: usize = 3;

type Test = (&'static str, fn(&World) -> Result<()>);

/// A name and the function of that name.
macro_rules! tests {
    ($($module:ident::$test:ident,)*) => { &[$((stringify!($test), $module::$test),)*] };
}

const TESTS: &[Test] = tests![
    claims::an_ext4_claim_keeps_its_data_when_its_pod_is_replaced,
    claims::an_xfs_claim_keeps_its_data_when_its_pod_is_replaced,
    claims::a_block_claim_is_a_device_that_keeps_its_data,
    claims::a_claim_is_placed_where_its_first_consumer_runs,
    claims::an_immediate_claim_is_bound_without_a_pod,
    claims::two_pods_on_one_node_share_a_claim,
    claims::deleting_a_claim_frees_its_space,
    claims::a_retained_volume_outlives_its_claim,
    claims::an_xfs_claim_grows_while_its_pod_runs,
    claims::an_ext4_claim_has_grown_when_its_next_pod_runs,
    claims::a_claim_with_an_unknown_parameter_says_which_ones_exist,
    claims::a_class_decides_on_blocks_sectors_and_compression,
    claims::the_examples_and_the_charts_own_test_work,
    pools::a_pool_that_cannot_be_used_says_why_and_takes_no_replicas,
    rights::a_nodes_token_cannot_touch_another_nodes_objects,
    failures::what_was_fsynced_survives_a_killed_node_plugin,
    failures::a_killed_controller_finishes_what_it_began,
    failures::a_restarted_kubelet_finds_its_volumes_in_use,
    failures::a_restarted_node_serves_its_volumes_again,
    failures::what_was_fsynced_survives_a_power_cut,
    moves::a_claim_of_three_replicas_moves_between_nodes_with_its_data,
    moves::a_block_claim_of_three_replicas_moves_between_nodes_with_its_data,
    replicas::a_killed_replica_costs_a_pause_and_comes_back,
    replicas::a_replica_that_stands_still_for_ten_seconds_costs_a_pause_and_comes_back,
    replicas::a_replicas_machine_that_dies_costs_a_pause_and_comes_back,
    replicas::a_replica_without_room_is_left_behind_until_there_is_some,
    replicas::damaged_blocks_of_one_replica_are_read_from_another_and_mended,
    network::a_replica_behind_a_split_costs_a_pause_and_comes_back,
    network::a_network_that_loses_one_direction_or_flaps_costs_no_write,
    network::a_primary_that_reaches_no_replica_waits_and_goes_on,
    api::a_minute_without_the_api_server_is_not_noticed,
    api::a_replica_that_dies_without_the_api_server_costs_a_pause_and_no_write,
    failover::a_volume_moves_away_from_a_frozen_node_which_then_writes_nothing,
    concerns::the_first_copy_answers_writes_while_another_stands_still,
    concerns::writes_wait_while_replicas_are_in_one_zone,
    concerns::a_durable_write_is_on_all_disks_without_a_flush,
    sanity::csi_sanity_has_nothing_to_complain_about,
    idle::an_idle_cluster_with_fifty_volumes_writes_nothing_for_a_minute,
];

fn main() -> ExitCode {
    // Options of the standard harness (--nocapture, --test-threads) mean nothing here.
    let (options, filters): (Vec<String>, Vec<String>) = std::env::args().skip(1).partition(|a| a.starts_with('-'));
    let chosen: Vec<&Test> = TESTS
        .iter()
        .filter(|(name, _)| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str())))
        .collect();
    if options.iter().any(|option| option == "--list") {
        chosen.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if !set("GALLEONFS_CLUSTER_TESTS") {
        println!(
            "{} cluster tests left out: they run with `make test-cluster`, as root",
            chosen.len()
        );
        return ExitCode::SUCCESS;
    }
    let start = Instant::now();
    let outcome = run(&chosen);
    let (verdict, failed) = match &outcome {
        Ok(failed) if failed.is_empty() => ("ok", 0),
        Ok(failed) => ("FAILED", failed.len()),
        // Without a cluster none of them has passed.
        Err(_) => ("FAILED", chosen.len()),
    };
    match &outcome {
        Ok(failed) if failed.is_empty() => {}
        Ok(failed) => println!("\nfailures:\n    {}", failed.join("\n    ")),
        Err(error) => println!("\nthere was no cluster to test in: {error:#}"),
    }
    // In the words of the standard harness, for whoever counts.
    println!(
        "\ntest result: {verdict}. {} passed; {failed} failed; {} filtered out; finished in {:.2}s\n",
        chosen.len() - failed,
        TESTS.len() - chosen.len(),
        start.elapsed().as_secs_f64()
    );
    match verdict {
        "ok" => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn set(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| !value.is_empty() && value != "0")
}

/// Gives the names of those that failed.
fn run(tests: &[&Test]) -> Result<Vec<&'static str>> {
    let name = std::env::var("GALLEONFS_LAB_NAME").unwrap_or_else(|_| LAB.to_string());
    let lab = Lab::up(&Options {
        name: name.clone(),
        nodes: NODES,
    })?;
    let program = std::env::var_os("GALLEONFS_PROGRAM").map(PathBuf::from);
    let program = install::build_program(lab.layout(), program.as_deref())?;
    install::into_lab(&lab, &program)?;

    let failed = tests
        .iter()
        .enumerate()
        .filter(|(index, (name, test))| !passes(&lab, &program, *index, name, *test))
        .map(|(_, (name, _))| *name)
        .collect();
    if !set("GALLEONFS_LAB_KEEP") {
        Lab::down(&name)?;
    }
    Ok(failed)
}

fn passes(lab: &Lab, program: &Path, index: usize, name: &str, test: fn(&World) -> Result<()>) -> bool {
    println!("test {name} ...");
    let start = Instant::now();
    let outcome = World::create(lab, program, index).and_then(|world| in_world(world, test));
    let seconds = start.elapsed().as_secs_f64();
    match outcome {
        Ok(()) => println!("test {name} ... ok ({seconds:.1} s)"),
        Err(ref error) => println!("test {name} ... FAILED after {seconds:.1} s: {error:#}"),
    }
    outcome.is_ok()
}

/// A failed assertion must not keep the other tests from running, nor the cluster from being taken down.
fn in_world(world: World, test: fn(&World) -> Result<()>) -> Result<()> {
    let outcome = catch_unwind(AssertUnwindSafe(|| test(&world)))
        .unwrap_or_else(|_| Err(anyhow!("an assertion failed, see above")))
        .map_err(|error| anyhow!("{error:#}\n{}", world.diagnosis()));
    let removed = world.remove().context("it left its namespace behind");
    outcome.and(removed)
}
