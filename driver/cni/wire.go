package cni

import (
	"bytes"
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// wire is a network's configuration as it comes.
type wire struct {
	CNIVersion   string          `json:"cniVersion"`
	Name         string          `json:"name"`
	Type         string          `json:"type"`
	Capabilities map[string]bool `json:"capabilities"`

	Mode     string            `json:"mode"`
	MTU      int               `json:"mtu"`
	Bridge   string            `json:"bridge"`
	Internal bool              `json:"internal"`
	Options  map[string]string `json:"options"` // further ones, as docker network create -o takes them
	Subnet   string            `json:"subnet"`
	Gateway  string            `json:"gateway"`
	Subnets  []addressRange    `json:"subnets"`
	Names    *bool             `json:"names"` // containers find each other by name; nil: true

	// The keys of the official bridge plugin that mean something here.
	IsDefaultGateway *bool `json:"isDefaultGateway"` // nil: true
	IPMasq           *bool `json:"ipMasq"`           // nil: true
	PortIsolation    bool  `json:"portIsolation"`
	HairpinMode      bool  `json:"hairpinMode"` // it is always on

	IPAM    json.RawMessage      `json:"ipam"`
	DNS     types.DNS            `json:"dns"`
	Args    conventionalArgs     `json:"args"`
	Runtime runtimeConfig        `json:"runtimeConfig"`
	Prev    json.RawMessage      `json:"prevResult"`
	Valid   []types.GCAttachment `json:"cni.dev/valid-attachments"`
}

// addressRange is a subnet with the range of it that addresses are taken from (CNI's CONVENTIONS.md, ipRanges).
type addressRange struct {
	Subnet  string `json:"subnet"`
	Start   string `json:"rangeStart"`
	End     string `json:"rangeEnd"`
	Gateway string `json:"gateway"`
}

// conventionalArgs is what users give for one container (CONVENTIONS.md, "args" in network config).
type conventionalArgs struct {
	CNI struct {
		IPs []string `json:"ips"`
		MAC string   `json:"mac"`
	} `json:"cni"`
}

// runtimeConfig is what the runtime gives for one container, where the configuration says that the plugin is capable of it.
type runtimeConfig struct {
	PortMappings []portMapping    `json:"portMappings"`
	IPRanges     [][]addressRange `json:"ipRanges"`
	Bandwidth    bandwidth        `json:"bandwidth"`
	DNS          struct {
		Servers  []string `json:"servers"`
		Searches []string `json:"searches"`
		Options  []string `json:"options"`
	} `json:"dns"`
	IPs     []string        `json:"ips"`
	MAC     string          `json:"mac"`
	Aliases json.RawMessage `json:"aliases"` // a list, or lists by the names of networks
}

type portMapping struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP"`
}

// bandwidth is in bits per second, and in bits.
type bandwidth struct {
	IngressRate  uint64 `json:"ingressRate"`
	IngressBurst uint64 `json:"ingressBurst"`
	EgressRate   uint64 `json:"egressRate"`
	EgressBurst  uint64 `json:"egressBurst"`
}

// environment is what CNI_ARGS may give. The names of the fields are those of the arguments.
type environment struct {
	types.CommonArgs
	IP                         types.UnmarshallableString
	MAC                        types.UnmarshallableString
	K8S_POD_NAMESPACE          types.UnmarshallableString
	K8S_POD_NAME               types.UnmarshallableString
	K8S_POD_INFRA_CONTAINER_ID types.UnmarshallableString
	K8S_POD_UID                types.UnmarshallableString
}

// idle are keys of the official bridge plugin that are obeyed if they ask for what usernet does anyway.
var idle = map[string]string{
	"isGateway": "true", "forceAddress": "false", "promiscMode": "false", "vlan": "0", "macspoofchk": "false",
	"enabledad": "false", "disableContainerInterface": "false",
}

var keys = func() (names []string) {
	for _, f := range reflect.VisibleFields(reflect.TypeFor[wire]()) {
		names = append(names, f.Tag.Get("json"))
	}
	return names
}()

// decode reads a configuration. Keys that nobody knows are refused, but for those with a domain in them.
func decode(text []byte) (wire, error) {
	var all map[string]json.RawMessage
	var w wire
	if err := json.Unmarshal(text, &all); err != nil {
		return w, failed(types.ErrDecodingFailure, "read the network's configuration: %v", err)
	}
	for _, key := range slices.Sorted(maps.Keys(all)) {
		value, known := idle[key]
		switch {
		case slices.Contains(keys, key), known && string(bytes.TrimSpace(all[key])) == value, strings.ContainsAny(key, "./"):
		case known:
			return w, failed(types.ErrUnsupportedField, "%s: %.64s is not supported, only %s", key, all[key], value)
		default:
			return w, failed(types.ErrUnsupportedField, "%.64s: %.64s is not supported; known are %s", key, all[key], strings.Join(keys, ", "))
		}
	}
	if err := json.Unmarshal(text, &w); err != nil {
		return w, failed(types.ErrDecodingFailure, "read the network's configuration: %v", err)
	}
	var ipam types.IPAM
	if len(w.IPAM) > 0 && json.Unmarshal(w.IPAM, &ipam) != nil {
		return w, failed(types.ErrDecodingFailure, "ipam: %.64s: want an object with the type of a plugin", w.IPAM)
	}
	return w, nil
}
