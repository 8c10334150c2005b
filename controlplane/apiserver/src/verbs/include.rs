//! What stands beside the cells of a table's rows: `includeObject`.

use serde_json::Value;
use xebec_schema::Object;

use crate::error::ApiError;
use crate::handler::Call;
use crate::watch::Shape;

/// What is wanted beside the cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Include {
    /// Nothing.
    Nothing,
    /// Each object's metadata.
    Metadata,
    /// Each object.
    Whole,
}

impl Include {
    /// What a request asks for; of anything but a table there is nothing to ask.
    pub(super) fn of(call: &Call) -> Result<Self, ApiError> {
        if call.negotiated.shape != Shape::Table {
            return Ok(Self::Metadata);
        }
        match call.query.get("includeObject") {
            None | Some("" | "Metadata") => Ok(Self::Metadata),
            Some("None") => Ok(Self::Nothing),
            Some("Object") => Ok(Self::Whole),
            Some(other) => Err(ApiError::bad_request(format!(
                "Unable to convert to Table as requested: includeObject: Invalid value: {other:?}: must be 'Metadata', 'Object', 'None', or empty"
            ))),
        }
    }

    /// Puts it into a table, whose rows have the metadata already. `objects`: those of the rows, if they are wanted.
    pub(super) fn place(self, table: &mut Value, objects: Option<&[Object]>) {
        if self == Self::Metadata {
            return;
        }
        let rows = table.get_mut("rows").and_then(Value::as_array_mut);
        for (index, row) in rows.into_iter().flatten().enumerate() {
            let object = objects.and_then(|objects| objects.get(index));
            row["object"] = object.cloned().unwrap_or_default();
        }
    }
}
