//! A crate depends only on crates of lower tiers (ARCHITECTURE.md).

use serde_json::Value;
use std::collections::BTreeMap;
use std::process::Command;

/// Every crate of the workspace and its tier.
const TIERS: [(&str, u32); 11] = [
    ("disk", 0),
    ("dataplane", 1),
    ("formats", 1),
    ("repository", 1),
    ("storage", 2),
    ("chain", 3),
    ("tracking", 3),
    ("export-nbd", 3),
    ("engine", 4),
    ("api", 5),
    ("highwater", 6),
];

/// Made for tests alone: may use everything that is not above it in purpose, and is a dev-dependency only.
const FOR_TESTS: [&str; 2] = ["testkit", "interop"];

#[test]
fn crates_depend_on_lower_tiers_only() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let tiers = BTreeMap::from(TIERS);
    let packages = metadata["packages"].as_array().expect("packages");
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().expect("a name");
        if FOR_TESTS.contains(&name) {
            continue;
        }
        let Some(tier) = tiers.get(name) else {
            wrong.push(format!("{name} has no tier: add it to ARCHITECTURE.md and to this test"));
            continue;
        };
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let other = dependency["name"].as_str().expect("a name");
            let for_development = dependency["kind"] == "dev";
            if FOR_TESTS.contains(&other) && !for_development {
                wrong.push(format!("{name} uses {other} outside its tests"));
            }
            if let Some(other_tier) = tiers.get(other)
                && other_tier >= tier
                && !for_development
            {
                wrong.push(format!("{name} (tier {tier}) depends on {other} (tier {other_tier})"));
            }
        }
    }
    let members: Vec<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    for name in tiers.keys().copied().chain(["testkit"]) {
        if !members.contains(&name) {
            wrong.push(format!("{name} has a tier but is no crate of the workspace"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
