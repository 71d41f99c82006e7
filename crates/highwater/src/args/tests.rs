use super::*;
use clap::CommandFactory;

#[test]
fn the_grammar_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn the_fixed_names_parse() {
    for line in [
        "create -f qcow2 -o cluster_size=64k,lazy_refcounts=on -b base.raw -F raw a.qcow2 10G",
        "--api /x/api.sock --json info disk1",
        "info --json disk1 --api /x/api.sock",
        "info --output=json a.raw",
        "map -f qcow2 a",
        "tree",
        "tree a b -o x.svg --ascii",
        "check --repair leaks a.qcow2",
        "check -r all a.qcow2",
        "measure -O qcow2 a.raw",
        "measure -O qcow2 --size 1G",
        "resize a.qcow2 +1G",
        "resize --shrink a.qcow2 -1G",
        "convert -c -f raw -O qcow2 a.raw b.qcow2",
        "compare -f raw -F qcow2 a b",
        "serve a.qcow2 -f qcow2 --name e --socket /s --listen h:1 --tls /t --read-only --cache none --api /a",
        "daemon --state /s --api /a",
        "disk add a.qcow2",
        "disk list",
        "disk show a",
        "disk remove a",
        "disk open a",
        "disk unexport a e",
        "disk unexport a --all",
        "jobs wait 1",
        "job list",
        "jobs pause 1",
        "jobs resume 1",
        "jobs set-rate 1 60M",
        "jobs set-rate 1 none",
        "jobs start --rate 1.5G -",
        "convert --rate 60M a.raw b.qcow2",
        "attach a",
        "mark a before",
        "mark a b vm --json before --freeze /s --freeze-limit 500",
        "mark a.raw before -f raw --history-file /h",
        "marks list a -v",
        "marks show a before",
        "marks delete a before",
        "marks trust a",
        "changes a --since x --until y --json",
        "changes a --since x --chart --picture a.png",
        "changes a --since x --summary",
        "chain show a",
        "chain verify a.qcow2 --hash --json",
        "chain accept a.qcow2",
        "chain rebase a.qcow2 -b base.raw -F raw -u",
        "chain repair a.qcow2",
        "chain forget base.qcow2 a.qcow2",
        "snapshot create a b vm --json before --freeze /s --freeze-limit 500",
        "snapshot list a",
        "snapshot delete a before --into child --rate 60M",
        "promote a b.qcow2 -O qcow2 -o cluster_size=64k --rate 60M",
        "move a /x/b.raw --remove-source",
        "commit a",
        "snapshot revert a before",
        "snapshot clone a before b.qcow2",
        "completions bash",
        "freeze-guard /s --limit 500 --connect-limit 1 --freeze-limit 2",
    ] {
        let words = std::iter::once("highwater").chain(line.split(' '));
        Cli::try_parse_from(words).unwrap_or_else(|e| panic!("{line}: {e}"));
    }
    for line in [
        "disk unexport a",
        "disk unexport a e --all",
        "create -f vdi x 1M",
        "mark",
        "changes a",
        "serve --socket-mode 600 a.raw",
        "jobs set-rate 1 0",
        "jobs set-rate 1",
    ] {
        let words = std::iter::once("highwater").chain(line.split(' '));
        assert!(Cli::try_parse_from(words).is_err(), "{line} was understood");
    }
}
