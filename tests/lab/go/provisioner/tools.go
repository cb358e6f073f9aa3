//go:build tools

// Package provisioner names the program that the lab builds, so that `go mod tidy` keeps its module.
package provisioner

import _ "github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner"
