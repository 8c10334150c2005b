//! Validation errors in the words of apimachinery's `field.Error`.

use std::fmt::Display;

/// One thing that is wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// `details.causes[].reason` of a Status, such as `FieldValueInvalid`.
    pub reason: &'static str,
    /// Where, such as `spec.containers[0].name`.
    pub field: String,
    /// What, such as `Invalid value: "x": must be …`.
    pub message: String,
}

impl FieldError {
    fn new(reason: &'static str, field: impl Into<String>, message: String) -> Self {
        Self {
            reason,
            field: field.into(),
            message,
        }
    }

    /// The value breaks a rule.
    pub fn invalid(field: impl Into<String>, value: impl Display, detail: &str) -> Self {
        Self::new(
            "FieldValueInvalid",
            field,
            format!("Invalid value: {value}: {detail}"),
        )
    }

    /// The value is missing.
    pub fn required(field: impl Into<String>, detail: &str) -> Self {
        let colon = if detail.is_empty() { "" } else { ": " };
        Self::new(
            "FieldValueRequired",
            field,
            format!("Required value{colon}{detail}"),
        )
    }

    /// The value is none of those that are known.
    pub fn not_supported(field: impl Into<String>, value: impl Display, known: &[&str]) -> Self {
        let known: Vec<String> = known.iter().map(|known| format!("{known:?}")).collect();
        let message = format!(
            "Unsupported value: {value}: supported values: {}",
            known.join(", ")
        );
        Self::new("FieldValueNotSupported", field, message)
    }

    /// The field may not be set, or not so.
    pub fn forbidden(field: impl Into<String>, detail: &str) -> Self {
        Self::new("FieldValueForbidden", field, format!("Forbidden: {detail}"))
    }

    /// The value stands twice where it may stand once.
    pub fn duplicate(field: impl Into<String>, value: impl Display) -> Self {
        Self::new(
            "FieldValueDuplicate",
            field,
            format!("Duplicate value: {value}"),
        )
    }

    /// The value refers to what there is none of.
    pub fn not_found(field: impl Into<String>, value: impl Display, detail: &str) -> Self {
        let colon = if detail.is_empty() { "" } else { ": " };
        Self::new(
            "FieldValueNotFound",
            field,
            format!("Not found: {value}{colon}{detail}"),
        )
    }

    /// The value is too long.
    pub fn too_long(field: impl Into<String>, limit: usize) -> Self {
        Self::new(
            "FieldValueTooLong",
            field,
            format!("Too long: may not be more than {limit} bytes"),
        )
    }
}

impl std::fmt::Display for FieldError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}
