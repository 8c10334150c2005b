//! The type table of the Kubernetes API and everything that walks an object with it.

pub mod apply;
pub mod convert;
pub mod decode;
pub mod defaults;
pub mod field_error;
pub mod fieldset;
pub mod json_syntax;
mod limits;
pub mod openapi;
pub mod patch;
mod place;
pub mod print;
pub mod protobuf;
pub mod quantity;
pub mod selector;
pub mod shape;
pub mod strategy;
pub mod table;
pub mod times;
pub mod validate;
pub mod warnings;

/// An API object: JSON with sorted keys.
pub type Object = serde_json::Value;
