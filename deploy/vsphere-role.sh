#!/bin/bash
# Makes the role that Atoll's supervisor needs in a vCenter, or brings it up to
# date, and gives it to a user on everything. Run it as an administrator, with
# govc's environment set (GOVC_URL, GOVC_USERNAME, …):
#
#   deploy/vsphere-role.sh atoll@vsphere.local
#
# The list is supervisor/namespaces/vc's (role.go); a test there holds them the
# same, and proves that it suffices and that nothing in it is unused; storage/vmdk
# proves so for volumes.
set -euo pipefail
user=${1:?usage: $0 USER@DOMAIN}
role='Atoll Supervisor'
mapfile -t privileges < <(sed '/^#/d;/^$/d;s/ .*//' <<'LIST'
Authorization.ModifyPermissions           permissions of the access list on pools and folders
Authorization.ModifyRoles                 the roles "Atoll namespace edit" and "Atoll namespace owner", made when first needed
Cns.Searchable                            volumes: what Cloud Native Storage knows of them
Datastore.FileManagement                  volumes: their disks, on the datastores of their policies
Folder.Create                             a namespace's VM folder
Folder.Delete                             deletion of a namespace
Folder.Move                               a folder that was moved goes back
Folder.Rename                             a folder that was renamed gets its name back
Global.LogEvent                           events on a namespace's pools
Global.ManageCustomFields                 the custom attributes that say whose an object is
Global.SetCustomField                     their values
InventoryService.Tagging.AttachTag        tags of a namespace
InventoryService.Tagging.ObjectAttachable tags of a namespace, on its pools
Resource.CreatePool                       a namespace's resource pools
Resource.DeletePool                       deletion of a namespace
Resource.EditPool                         limits, reservations and shares
Resource.MovePool                         a pool that was moved goes back
Resource.RenamePool                       a pool that was renamed gets its name back
StorageProfile.View                       storage policies
VirtualMachine.Config.AddExistingDisk     volumes: a disk for a pod's virtual machine
VirtualMachine.Config.AddRemoveDevice     volumes: the same, and its removal
LIST
)
if govc role.ls "$role" >/dev/null 2>&1; then
	govc role.update "$role" "${privileges[@]}"
else
	govc role.create "$role" "${privileges[@]}"
fi
govc permissions.set -principal "$user" -role "$role" -propagate=true /
