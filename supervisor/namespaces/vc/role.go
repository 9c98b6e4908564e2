package vc

// RoleName is the role of the user that the supervisor signs in to vCenter as.
const RoleName = "Atoll Supervisor"

// A Privilege of vSphere that a Client or the volumes need, and what for. It has to be
// granted at vCenter's root folder, and propagate.
type Privilege struct{ ID, For string }

// role is what the role holds: everything that a Client and storage/vmdk ask
// for, and nothing else. TestRole proves both. deploy/vsphere-role.sh has it.
var role = []Privilege{
	{"Authorization.ModifyPermissions", "permissions of the access list on pools and folders"},
	{"Authorization.ModifyRoles", "the roles \"Atoll namespace edit\" and \"Atoll namespace owner\", made when first needed"},
	{"Cns.Searchable", "volumes: what Cloud Native Storage knows of them"},
	{"Datastore.FileManagement", "volumes: their disks, on the datastores of their policies"},
	{"Folder.Create", "a namespace's VM folder"},
	{"Folder.Delete", "deletion of a namespace"},
	{"Folder.Move", "a folder that was moved goes back"},
	{"Folder.Rename", "a folder that was renamed gets its name back"},
	{"Global.LogEvent", "events on a namespace's pools"},
	{"Global.ManageCustomFields", "the custom attributes that say whose an object is"},
	{"Global.SetCustomField", "their values"},
	{"InventoryService.Tagging.AttachTag", "tags of a namespace"},
	{"InventoryService.Tagging.ObjectAttachable", "tags of a namespace, on its pools"},
	{"Resource.CreatePool", "a namespace's resource pools"},
	{"Resource.DeletePool", "deletion of a namespace"},
	{"Resource.EditPool", "limits, reservations and shares"},
	{"Resource.MovePool", "a pool that was moved goes back"},
	{"Resource.RenamePool", "a pool that was renamed gets its name back"},
	{"StorageProfile.View", "storage policies"},
	{"VirtualMachine.Config.AddExistingDisk", "volumes: a disk for a pod's virtual machine"},
	{"VirtualMachine.Config.AddRemoveDevice", "volumes: the same, and its removal"},
}

// Privileges are the role's, by id.
func Privileges() []string {
	ids := make([]string, len(role))
	for i, p := range role {
		ids[i] = p.ID
	}
	return ids
}
