//! `highwater views …`: disks that can be read as they were at a mark.

use super::{Outcome, target};
use crate::args::{Global, ViewsVerb};
use crate::exit;
use crate::output;
use crate::size::human;
use api::{ViewList, ViewReport};

pub(crate) async fn run(global: &Global, verb: ViewsVerb) -> Outcome {
    let client = target::client(global)?;
    match verb {
        ViewsVerb::List => {
            let views = client.views().await?;
            if global.wants_json() {
                output::json(&ViewList { views })?;
            } else if !global.quiet {
                output::table(&["view", "saved", "at most", "state", "uri"], views.iter().map(row))?;
            }
        }
        ViewsVerb::Close { view } => client.close_view(&view).await?,
    }
    Ok(exit::OK)
}

fn row(view: &ViewReport) -> Vec<String> {
    vec![
        view.name.clone(),
        human(view.stored),
        human(view.limit),
        view.ended.as_ref().map_or_else(|| "open".to_owned(), |reason| format!("ended: {reason}")),
        view.uris.first().cloned().unwrap_or_default(),
    ]
}
